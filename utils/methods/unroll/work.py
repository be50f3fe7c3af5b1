"""What an outer step that unrolls students costs, counted before it."""

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


def count_work(
    cost: NetworkCost,
    *,
    images: int,
    batch_syn: int | None,
    syn_steps: int,
    students: int,
    students_flag: str,
    processes: int,
    window: int | None = None,
    vectors: int = 1,
    target: int = 0,
    keeps_train: bool = False,
) -> Work:
    """Count the work of one of `processes`, every student taking all `syn_steps` steps on `images`.

    They divide the students, or of a single one each batch; UserError, which names `students_flag`,
    where they cannot. Gradients flow through the last `window` steps. A state has `vectors` vectors
    of parameters; `target` real images stand in the loss at the end.
    """
    batch = whole_batch = min(batch_syn or images, images)
    _check_processes(students, students_flag, whole_batch, processes)
    back = min(window or syn_steps, syn_steps)
    again = 0 if vectors == 1 else GRADIENT_PASSES  # the gradient once more, on the way back
    passes = syn_steps * GRADIENT_PASSES + back * (ADJOINT_PASSES + again)
    flop = passes * whole_batch * cost.flop + target * GRADIENT_PASSES * cost.flop
    all_students = students
    if students == 1:
        batch = -(-whole_batch // processes)
    else:
        students //= processes
    kept = vectors * _kept_vectors(back)
    return Work(
        flop=flop * all_students // processes,
        passes=syn_steps + back * (GRADIENTS_A_STEP - 1),
        batch=batch,
        whole_batch=whole_batch,
        students=students,
        kept_bytes=students * kept * FLOAT_BYTES * cost.parameters,
        image_bytes=ADJOINT_COPIES * cost.activation_bytes,
        compiled_layers=COMPILED_FUNCTIONS * cost.layers,
        graph_bytes=students * _graph_bytes(cost, syn_steps, whole_batch),
        keeps_train=keeps_train,
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


def _check_processes(students: int, flag: str, batch: int, processes: int) -> None:
    """UserError where there are more processes than work for them."""
    if students > 1 and students % processes:
        raise UserError(
            f"--{flag} {students} cannot be divided over {processes} processes: "
            f"choose a multiple of {processes}, or 1 to divide the inner batches"
        )
    if students == 1 and processes > batch:
        raise UserError(
            f"{processes} processes are more than the {batch} images of an inner batch: start fewer"
        )
