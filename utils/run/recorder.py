"""Write a run's sets, pictures, evaluations, log and checkpoints."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

from torch import Tensor

from utils.compute.cost import fitting_models
from utils.compute.device import beside, compute_dtype, peak_memory
from utils.compute.execution import Execution
from utils.core import ranks, stopping
from utils.core.errors import UserError
from utils.core.pictures import save_grid
from utils.core.progress import time_left
from utils.core.provenance import describe_environment
from utils.core.rng import derive_seed
from utils.data.augment import active_groups
from utils.data.dataset import ImageDataset
from utils.data.distilled import SyntheticSet
from utils.data.identity import KEY, DataIdentity
from utils.data.label_forms import LABEL_FORMS
from utils.experts.buffer import ExpertBuffer
from utils.measure.protocol import Accuracies, EvalExecution, Protocol, evaluate
from utils.methods.base import Method, Step
from utils.methods.outer_state import Diverged, OuterState
from utils.methods.registry import METHODS, foreign_flags
from utils.run.directory import RunDir
from utils.run.log import MetricsLog

CHECKPOINT_SECONDS = 600
STEPS_TO_JUDGE = 5  # steps of a call before it says how long the rest takes
STEPS_TO_LEARN = 50  # steps in which something is learned, or it is said
# What distilled_best.pt is, by --select.
BEST = {
    "test": "best so far, chosen on the test set",
    "val": "best so far, chosen on the images held out",
    "last": "latest evaluated, kept as best",
}


class Recorder:
    """Writes the files of one run; of several processes the main one, the others evaluate along.

    `how` is what `auto` was taken for; `evaluations_left` counts those behind an iteration. All
    sets of the method are evaluated by those of `evaluation_models` that fit them; the first
    decides which iteration is the best, per set, by `select`: a key of BEST. `best` holds those
    accuracies, `evaluated` is the iteration of the last evaluation.
    """

    def __init__(
        self,
        options: Any,
        *,
        run: RunDir,
        method: Method,
        data: ImageDataset,
        identity: DataIdentity,
        labels: Tensor,
        experts: ExpertBuffer | None,
        how: Mapping[str, Any],
        evaluations_left: Callable[[int], int],
    ) -> None:
        """Write the configuration of a run with `options`, and be ready to record it."""
        self.run, self.method, self.data, self.labels = run, method, data, labels
        self.identity = identity
        self.options, self.how, self.evaluations_left = options, how, evaluations_left
        self.spec = METHODS[options.method]
        self.label_form = self.spec.label_form(options)
        self.trains_on_soft = self.label_form in LABEL_FORMS
        self.models, _ = fitting_models(
            options.evaluation_models,
            channels=data.channels,
            num_classes=data.num_classes,
            image_size=data.image_size,
        )
        self.num_experts = 0 if experts is None else len(experts)
        self.log = MetricsLog(run.path, wandb_mode=options.wandb)
        self.evaluation = EvalExecution(
            at_once=how["eval_at_once"],
            execution=Execution.on(
                labels.device, compiled=how["eval_compiled"], cuda_graphs=options.cuda_graphs
            ),
            dtype=compute_dtype(options.precision),
        )
        self.protocol = Protocol(
            num_eval=options.num_eval,
            epochs=options.epoch_eval_train,
            batch_size=options.batch_train,
            dsa_groups=active_groups(dsa=options.dsa, strategy=options.dsa_strategy),
        )
        self.best = {"raw": -1.0, "ema": -1.0}
        self.evaluated = -1
        self._seconds: list[float] = []
        self._latest: deque[tuple[float, Mapping[str, Any]]] = deque(maxlen=STEPS_TO_LEARN)
        self._checkpoint_at = time.monotonic()
        self._evaluation_seconds: float | None = None
        self._peak_before = peak_memory(labels.device)
        hidden = {*foreign_flags(options.method), "force"}  # --force is decided anew each time
        self.config = {name: each for name, each in asdict(options).items() if name not in hidden}
        known = {} if experts is None else {"number": len(experts), "epochs": experts.epochs}
        run.save_config(
            self.config,
            experts=known if experts is None else experts.settings | known,
            images=identity,
            environment=describe_environment(labels.device) | {"processes": str(ranks.world())},
        )

    def begin(self) -> None:
        """Forget what a call has logged that ended before its first checkpoint."""
        self.log.keep_up_to(-1, evaluated=-1, rewinds=0)

    def resume(self, state: OuterState, checkpoint: Mapping[str, Any]) -> None:
        """Bring `state` and the log back to where the checkpoint was written.

        The best so far counts only where it was measured as it will be from now on. UserError where
        the checkpoint does not fit, which cannot come from a call of the same settings.
        """
        try:
            state.load_state_dict(checkpoint["state"])
            self.method.load_state_dict(checkpoint.get("method", {}))
            self.evaluated = checkpoint["evaluated"]
            # Before there was --select the best was chosen on the test set.
            if {"select": "test"} | checkpoint["measured_by"] == self._measured_by():
                self.best = dict(checkpoint["best"])
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError):
            raise UserError(
                f"{self.run.checkpoint} does not fit its settings: choose another --run_name"
            ) from None
        self.log.keep_up_to(state.iteration, evaluated=self.evaluated, rewinds=len(state.rewinds))
        self.log.say(f"continuing at iteration {state.iteration}")

    def rewind(self, state: OuterState, reason: Diverged) -> None:
        """Go back to the last checkpoint with half the rate that `reason` names, and record it."""
        checkpoint = self.run.agreed_checkpoint()
        assert checkpoint is not None
        entry = state.rewind(checkpoint["state"], reason)
        self.resume(state, checkpoint | {"state": state.state_dict()})
        # In this order: a call that ends in between diverges and rewinds again.
        self.log.log(kind="rewind", **entry)
        self.save_checkpoint(state)
        self.log.say(f"{reason}: now {entry['rate']} {entry['value']:.3g}")

    def _measured_by(self) -> dict[str, Any]:
        soft = {"labels": self.label_form} if self.trains_on_soft else {}
        return {
            **asdict(self.protocol),
            "model": self.models[0],
            "select": self.options.select,
            **soft,
        }

    def log_step(self, state: OuterState, step: Step, seconds: float) -> None:
        """Log the step that `state` has just taken; after a few, say how long the rest takes."""
        iteration = state.iteration - 1
        if step.distances:
            self.log.log(kind="distances", iteration=iteration, **step.distances)
        self.log.log(
            kind="step",
            iteration=iteration,
            loss=step.loss.item(),
            **step.record,
            **self._learned_rate(state),
            seconds=seconds,
        )
        self._say_if_stalled(step)
        self._seconds.append(seconds)
        if len(self._seconds) == STEPS_TO_JUDGE:
            self.log.say(
                time_left(
                    self._seconds,
                    self.options.Iteration - state.iteration,
                    evaluations=self.evaluations_left(self.evaluated),
                    evaluation_seconds=self._evaluation_seconds,
                )
            )

    def _say_if_stalled(self, step: Step) -> None:
        """Say so, every STEPS_TO_LEARN steps, where nothing was learned in them."""
        self._latest.append((step.loss.item(), step.record))
        if len(self._latest) == STEPS_TO_LEARN:
            losses, records = zip(*self._latest, strict=True)
            if complaint := self.spec.stalled(losses, records):
                self.log.say(complaint)
            self._latest.clear()

    @staticmethod
    def _learned_rate(state: OuterState) -> dict[str, float]:
        return {"syn_lr": state.syn_lr} if "syn_lr" in state.learned else {}

    def log_memory(self, state: OuterState) -> None:
        """Log the most bytes that were held, and by how much the steps of this call, with the
        evaluations between them, have raised that.
        """
        if self._seconds:
            peak = peak_memory(self.labels.device)
            self.log.log(
                kind="memory",
                iteration=state.iteration - 1,
                peak_bytes=peak,
                raised_bytes=peak - self._peak_before,
            )

    def shown(self, state: OuterState, step: Step) -> str:
        """What the progress bar says of a step."""
        rate = "".join(f"{name} {value:.3g}" for name, value in self._learned_rate(state).items())
        return " ".join(filter(None, (f"loss {step.loss:.4f}", step.shown, rate)))

    def log_divergence(self, state: OuterState, reason: Diverged) -> None:
        """Log why the step behind `state` could not be taken, which ends the run."""
        self.log.log(
            kind="diverged", iteration=state.iteration, rate=reason.rate, reason=str(reason)
        )

    def save(self, state: OuterState, tag: str | None = None, *, set: str = "raw") -> None:
        """Write distilled_<tag>.pt and images_<tag>.png of the raw or the ema set; by default
        the tag is the iteration.

        The sets of single iterations leave out the ZCA matrix, 37 MB for CIFAR.
        """
        if not ranks.is_main():
            return
        include_whitening = tag is not None
        tag = str(state.iteration) if tag is None else tag
        images = _images(state, set)
        SyntheticSet(
            images=images,
            labels=self.labels,
            syn_lr=state.syn_lr,
            dataset=self.data.name,
            subset=self.data.subset,
            model=self.options.model,
            ipc=self.options.ipc,
            class_names=self.data.class_names,
            normalisation=self.data.normalisation,
            iteration=state.iteration,
            set=set,
            config=self.config,
            rewinds=tuple(state.rewinds),
            data=self.identity.to_dict(),
            soft_labels=state.soft_labels,
            label_form=self.label_form,
            step_lrs=state.learned.get("step_lrs"),
            train_steps=self.spec.train_steps(self.method.state_dict()),
        ).save(self.run.distilled(tag), include_whitening=include_whitening)
        pixels = self.data.normalisation.inverse(images)
        save_grid(pixels, self.run.picture(tag), ipc=self.options.ipc)

    def save_last(self, state: OuterState) -> None:
        for set in self.spec.sets:
            self.save(state, _tag("last", set), set=set)

    def evaluate(self, state: OuterState) -> None:
        """Train fresh networks on the sets, log their accuracies, keep the best of each set."""
        began = time.monotonic()
        labels, form = self.labels, None
        if self.trains_on_soft:
            assert state.soft_labels is not None
            labels, form = state.soft_labels, self.label_form
        for set in self.spec.sets:
            for model in self.models:
                accuracies = evaluate(
                    _images(state, set),
                    labels,
                    self.data.test,
                    num_classes=self.data.num_classes,
                    model=model,
                    lr=state.syn_lr,
                    protocol=self.protocol,
                    seed=derive_seed(self.options.seed, "evaluation", state.iteration, set),
                    label_form=form,
                    run=self.evaluation,
                    val=self.data.val,
                )
                self.log.log(
                    kind="eval",
                    iteration=state.iteration,
                    set=set,
                    model=model,
                    acc_mean=accuracies.mean,
                    acc_std=accuracies.std,
                    accs=list(accuracies.accs),
                    **({"labels": "soft"} if self.trains_on_soft else {}),
                    **_held_out_record(accuracies.val),
                )
                line = f"iteration {state.iteration:6}  {set:3}  {model:10} {accuracies}"
                line += f"  held out {accuracies.val}" if accuracies.val else ""
                if model == self.models[0] and self._is_best(set, accuracies):
                    self.save(state, _tag("best", set), set=set)
                    line += f"  {BEST[self.options.select]}"
                self.log.say(line)
        self.evaluated = state.iteration
        self._evaluation_seconds = time.monotonic() - began

    def result(self) -> str:
        """Name the accuracies of the best sets, where some were measured."""
        best = [f"{set} {accuracy:.2%}" for set, accuracy in self.best.items() if accuracy >= 0]
        measured_on = "images held out" if self.options.select == "val" else "test images"
        return f"; best accuracy on {measured_on}: {', '.join(best)}" if best else ""

    def _is_best(self, set: str, accuracies: Accuracies) -> bool:
        """Whether these are, as selected, the best of the set so far; remembers it."""
        chosen_on = accuracies.val if self.options.select == "val" else accuracies
        assert chosen_on is not None
        is_best = self.options.select == "last" or chosen_on.mean > self.best[set]
        if is_best:
            self.best[set] = chosen_on.mean
        return is_best

    def is_checkpoint_old(self) -> bool:
        return time.monotonic() - self._checkpoint_at > CHECKPOINT_SECONDS

    def save_checkpoint(
        self, state: OuterState, *, method: Mapping[str, Any] | None = None
    ) -> None:
        """Keep what continuing needs, `method` as the method's state where that has changed since.
        All randomness, the order of the experts included, follows from the seed and the iteration.
        """
        self._checkpoint_at = time.monotonic()
        if not ranks.is_main():
            return
        self.log.sync()
        self.run.save_checkpoint(
            {
                "best": self.best,
                "evaluated": self.evaluated,
                "measured_by": self._measured_by(),
                "num_experts": self.num_experts,
                "how": dict(self.how),
                "state": state.state_dict(),
                "method": self.method.state_dict() if method is None else method,
                "config": dict(self.config),
                KEY: self.identity.to_dict(),
            }
        )

    @contextmanager
    def kept(self, state: OuterState) -> Iterator[None]:
        """Keep `state`, which the block must not change, where the block fails or is given up
        after a signal.
        """
        keep = partial(self.save_checkpoint, state, method=self.method.state_dict())

        def keep_beside() -> None:  # by another thread than that which is in the block
            with beside(state.images.device):
                keep()

        try:
            with stopping.abandonable(keep_beside):
                yield
        except Exception:  # an expert of no use, no memory, a process that has left
            keep()
            raise


def _held_out_record(val: Accuracies | None) -> dict[str, Any]:
    """What an evaluation record says beside the test accuracies, where images are held out."""
    if val is None:
        return {}
    return {"val_mean": val.mean, "val_std": val.std, "val_accs": list(val.accs)}


def _images(state: OuterState, set: str) -> Tensor:
    """Those of a set."""
    return state.images if set == "raw" else state.ema_images


def _tag(tag: str, set: str) -> str:
    """The tag of a set's file."""
    return tag if set == "raw" else f"{set}_{tag}"
