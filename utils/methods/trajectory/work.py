"""What an outer step of trajectory matching costs, counted before it."""

from typing import Any

from utils.compute.cost import FLOAT_BYTES, GRADIENT_PASSES, NetworkCost
from utils.core.errors import UserError
from utils.methods.base import Work
from utils.methods.unroll.engine import KEPT_STEPS

# In units of one forward pass: the product of the reverse sweep has the forward pass and the
# backward to inputs three times, to weights twice.
ADJOINT_PASSES = 8
# In units of a forward pass's activations: what one adjoint step holds at most.
ADJOINT_COPIES = 4
# Parameter vectors that a step of the full graph keeps: theta, its parts, the gradient's and the
# gradient, and their product with the rate.
GRAPH_VECTORS = 5
# Those in a sweep beside the kept steps: target, adjoint, gradient and product, the next theta and
# what it is made from, and the two ends of the segment that is drawn ahead.
SWEEP_VECTORS = 8
# A student's step there and back: the gradient, and its adjoint of about twice as many kernels.
GRADIENTS_A_STEP = 3
# The step and its adjoint.
COMPILED_FUNCTIONS = 2


def count_work(options: Any, cost: NetworkCost, processes: int = 1, *, classes: int) -> Work:
    """Count the work of one of `processes`, every student taking all `syn_steps` steps.

    They divide the trajectories, or of a single one each batch; UserError where they cannot. The
    work depends on the options ipc, syn_steps, batch_syn and trajectories.
    """
    images, students = classes * options.ipc, options.trajectories
    batch = whole_batch = min(options.batch_syn or images, images)
    _check_processes(students, whole_batch, processes)
    flop = options.syn_steps * whole_batch * cost.flop * (GRADIENT_PASSES + ADJOINT_PASSES)
    if students == 1:
        batch = -(-whole_batch // processes)
    else:
        students //= processes
    return Work(
        flop=flop * options.trajectories // processes,
        passes=options.syn_steps * GRADIENTS_A_STEP,
        batch=batch,
        whole_batch=whole_batch,
        students=students,
        kept_bytes=students * _kept_vectors(options.syn_steps) * FLOAT_BYTES * cost.parameters,
        image_bytes=ADJOINT_COPIES * cost.activation_bytes,
        compiled_layers=COMPILED_FUNCTIONS * cost.layers,
        graph_bytes=students * _graph_bytes(cost, options.syn_steps, whole_batch),
    )


def _kept_vectors(syn_steps: int) -> int:
    """Parameter vectors that the two sweeps keep of one student."""
    stride = -(-syn_steps // KEPT_STEPS)
    block = stride if stride > 1 else 0  # computed again
    return syn_steps // stride + block + SWEEP_VECTORS


def _graph_bytes(cost: NetworkCost, syn_steps: int, images: int) -> int:
    """Memory of the graph over all steps; each keeps its forward and its backward pass."""
    vectors = GRAPH_VECTORS * FLOAT_BYTES * cost.parameters
    return syn_steps * (2 * images * cost.activation_bytes + vectors)


def _check_processes(trajectories: int, batch: int, processes: int) -> None:
    """UserError where there are more processes than work for them."""
    if trajectories > 1 and trajectories % processes:
        raise UserError(
            f"--trajectories {trajectories} cannot be divided over {processes} processes: "
            f"choose a multiple of {processes}, or 1 to divide the inner batches"
        )
    if trajectories == 1 and processes > batch:
        raise UserError(
            f"{processes} processes are more than the {batch} images of an inner batch: start fewer"
        )
