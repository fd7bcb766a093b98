"""The order of samples and the schedule of the released training code, which `paper_compat: full` reproduces.

Both codes read one or more passes over their sets in parallel, and a pass is split into batches over all processes as
accelerate does it. Here every stream is a function of the position in the run, so that an item is the same after a
resume. Roles without an example at a position are absent from an item. A batch without any example is not trained.

The released code draws from random states that depend on the machine and the libraries, and Safety Mirage's draw of the
retain set has no seed. The draws here are those of the run's seed, with the same distribution.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from vlm_unlearn.data.dataset import UnlearningDataset
from vlm_unlearn.errors import UserError
from vlm_unlearn.methods import Method, Role
from vlm_unlearn.records import Example
from vlm_unlearn.training.stream import GroupByImage, UnlearningStream

SAFETY_MIRAGE_RETAIN_SIZE = 2000  # the number of retain records that its code draws
FORGET_AND_RETAIN: tuple[Role, Role] = ("forget", "retain")


@dataclass(frozen=True)
class BatchLayout:
    """How the samples of a run are split into batches."""

    batch_size: int  # per process
    accumulation_steps: int
    processes: int

    @property
    def samples_per_step(self) -> int:
        """The number of forget samples of an optimizer step, over all processes."""
        return self.batch_size * self.accumulation_steps * self.processes

    @property
    def rows(self) -> int:
        """The number of samples in one batch of each process."""
        return self.batch_size * self.processes

    def batches(self, samples: int) -> int:
        """Returns the number of batches per process in a pass over some samples."""
        return math.ceil(samples / self.rows)

    def index(self, batch: int, row: int, samples: int) -> int | None:
        """Returns the sample of a pass at a row of the batches of all processes, None for none.

        On one process the last batch is smaller. On several, it is filled from the beginning of the pass.
        """
        index = batch * self.rows + row
        if index < samples:
            return index
        return None if self.processes == 1 else index % samples


def count_steps(
    training_set: UnlearningDataset, method: Method, layout: BatchLayout, epochs: float, max_steps: int | None
) -> int:
    """Returns the number of optimizer steps of a run: ``max_steps``, or else the steps of its epochs.

    An epoch is a pass over the forget set. In Safety Mirage's released code it is one over the retain set, and in
    SafeEraser's the last step of an epoch takes what is left.

    Args:
        training_set: The examples of all roles.
        method: The method.
        layout: How samples are split into batches.
        epochs: The number of epochs.
        max_steps: The number of steps. None or a negative number counts those of the epochs.
    """
    if max_steps is not None and max_steps > 0:
        return max_steps
    forget = len(training_set["forget"])
    if method.reproduced_code == "safe_eraser":
        steps = math.ceil(epochs * math.ceil(layout.batches(forget) / layout.accumulation_steps))
    elif method.reproduced_code == "safety_mirage":
        retain = min(len(training_set["retain"]), SAFETY_MIRAGE_RETAIN_SIZE)
        steps = math.ceil(epochs * max(layout.batches(retain) // layout.accumulation_steps, 1))
    else:
        steps = math.ceil(int(epochs * forget) / layout.samples_per_step)
    return max(1, steps)


def build_stream(
    training_set: UnlearningDataset,
    method: Method,
    layout: BatchLayout,
    steps: int,
    seed: int,
    group_by_image: GroupByImage = False,
) -> UnlearningStream:
    """Returns the stream of a run.

    Args:
        training_set: The examples of all roles.
        method: The method.
        layout: How samples are split into batches.
        steps: The number of optimizer steps.
        seed: The seed of the run.
        group_by_image: See `UnlearningStream`.

    Raises:
        UserError: The training set lacks examples that the method needs, or an option does not go with the released
            order.
    """
    length = steps * layout.samples_per_step
    if method.reproduced_code is None:
        return UnlearningStream(training_set, method, length, seed, group_by_image)
    if group_by_image:
        raise UserError(
            "paper_compat: full has the order of the released code. Set training.group_by_image=false, or "
            "method.paper_compat=true.",
            code="conflicting-settings",
            field="training.group_by_image",
        )
    kind = SafeEraserStream if method.reproduced_code == "safe_eraser" else SafetyMirageStream
    return kind(training_set, method, length, seed, layout)


class SafeEraserStream(UnlearningStream):
    """The order of SafeEraser's released code.

    The forget set is read in its order. The retain example is drawn with replacement. The decouple example is the one
    with the index of the retain example, since the code has overwritten the index of the forget example by then. At the
    end of an epoch, the optimizer steps with the batches that are left. Their loss is divided by the number of
    accumulation steps as always, so that the step has batches without examples, and these come first.

    Args:
        training_set: The examples of all roles.
        method: The method.
        length: The number of items.
        seed: Determines the draws.
        layout: How samples are split into batches.

    Raises:
        UserError: The released code would fail, because there are fewer decouple than retain examples.
    """

    def __init__(
        self, training_set: UnlearningDataset, method: Method, length: int, seed: int, layout: BatchLayout
    ) -> None:
        super().__init__(training_set, method, length, seed)
        self._layout = layout
        retain, decouple = (len(training_set.get(role, ())) for role in ("retain", "decouple"))
        if "decouple" in self._roles and decouple < retain:
            raise UserError(
                f"there are {retain} retain examples, but {decouple} decouple examples. The released code reads both "
                "with one index and fails here. Set method.paper_compat=true.",
                code="conflicting-settings",
                file=training_set.folder,
                field="method.paper_compat",
            )

    def __getitem__(self, position: int) -> dict[Role, Example]:
        index = self._forget_index(position)
        if index is None:
            return {}
        forget = self._examples["forget"][index]
        item: dict[Role, Example] = {"forget": forget}
        if self._method.forget_target == "refusal":
            item["forget"] = self._with_refusal(forget, position)
        retain = self.retain_index(position, index)
        for role in self._roles:
            if role != "forget":
                item[role] = self._examples[role][retain]
        return item

    def retain_index(self, position: int, forget_index: int) -> int:
        """Returns the index of the retain example at a position."""
        examples = len(self._examples.get("retain", ()))
        drawn = random.Random(f"{self._seed}-retain-{position}").randrange(max(1, examples))
        return (forget_index + drawn) % max(1, examples)

    def _forget_index(self, position: int) -> int | None:
        """Returns the index of the forget example at a position, None for none."""
        layout, samples = self._layout, len(self._examples["forget"])
        batch, row = divmod(position, layout.rows)
        step, micro_batch = divmod(batch, layout.accumulation_steps)
        batches = layout.batches(samples)  # of an epoch
        step_of_epoch = step % math.ceil(batches / layout.accumulation_steps)
        left = min(layout.accumulation_steps, batches - step_of_epoch * layout.accumulation_steps)
        batch_of_step = micro_batch - (layout.accumulation_steps - left)
        if batch_of_step < 0:
            return None
        return layout.index(step_of_epoch * layout.accumulation_steps + batch_of_step, row, samples)


class SafetyMirageStream(UnlearningStream):
    """The order of Safety Mirage's released code.

    An epoch is a pass over up to 2,000 retain records, which give the cross-entropy on retain answers. They are drawn
    once, and each process draws its own, since no seed reaches the draw of the released code. The forget examples, and
    the retain examples that are compared with the reference model, have passes of their own:

    - NPO: when one of the two sets is used up, both begin anew. Without the mirrored term there is only the forget set.
    - RMU: when the forget set is used up, it begins anew. When the retain set is used up, nothing is trained anymore.
      The code makes no new iterator. With ``alpha: 0`` there is only the forget set.

    Every pass is shuffled. Those of the forget examples and of the second retain examples are grouped by modality and
    length, as ``--group_by_modality_length`` does it. The flag does not reach the Trainer's own passes.

    Args:
        training_set: The examples of all roles.
        method: The method.
        length: The number of items.
        seed: Determines the draws.
        layout: How samples are split into batches.
    """

    def __init__(
        self, training_set: UnlearningDataset, method: Method, length: int, seed: int, layout: BatchLayout
    ) -> None:
        super().__init__(training_set, method, length, seed)
        self._layout = layout
        retain = range(len(training_set["retain"]))
        size = min(len(retain), SAFETY_MIRAGE_RETAIN_SIZE)
        self._retain_sets: list[Sequence[int]] = [
            random.Random(f"{seed}-retain-set-{process}").sample(retain, size) for process in range(layout.processes)
        ]
        self._passes: dict[tuple[Role, int], tuple[int, Sequence[int]]] = {}  # number and order, by role and process

    def __getitem__(self, position: int) -> dict[Role, Example]:
        batch, row = divmod(position, self._layout.rows)
        process = row // self._layout.batch_size
        item: dict[Role, Example] = {}
        for role in self._roles:
            place = self._place(role, batch)
            if place is None:
                return {}
            number, batch_of_pass = place
            if self._passes.get((role, process), (-1,))[0] != number:
                self._passes[role, process] = number, self.pass_order(role, number, process)
            order = self._passes[role, process][1]
            index = self._layout.index(batch_of_pass, row, len(order))
            if index is not None:
                item[role] = self._examples[_source(role)][self._indices(role, process)[order[index]]]
        return item

    def unique_examples(self, role: Role) -> list[Example]:
        indices = {index for process in range(self._layout.processes) for index in self._indices(role, process)}
        return [self._examples[_source(role)][index] for index in sorted(indices)]

    def _indices(self, role: Role, process: int) -> Sequence[int]:
        """Returns the examples of a role that a process reads."""
        return range(len(self._examples["forget"])) if role == "forget" else self._retain_sets[process]

    def _place(self, role: Role, batch: int) -> tuple[int, int] | None:
        """Returns the number of the pass over a role's examples, and the batch in it. None if nothing is trained."""
        forget, retain = (self._layout.batches(len(self._indices(name, 0))) for name in FORGET_AND_RETAIN)
        if "retain_reference" not in self._roles or role == "retain":
            return divmod(batch, forget if role == "forget" else retain)
        if not self._method.requirements.hidden_layers:  # NPO
            return divmod(batch, min(forget, retain))
        if batch >= retain:  # RMU
            return None
        return divmod(batch, forget if role == "forget" else retain)

    def pass_order(self, role: Role, number: int, process: int) -> Sequence[int]:
        """Returns the order of a role's examples in one of its passes, as places among the examples of a process."""
        draw = random.Random(f"{self._seed}-{role}-{number}")  # the processes of the released code share a seed here
        indices = self._indices(role, process)
        if role != "retain":
            examples = self._examples[_source(role)]
            return grouped_order([_modality_length(examples[index]) for index in indices], self._layout, draw)
        order = list(range(len(indices)))
        draw.shuffle(order)
        return order


def _source(role: Role) -> Role:
    """Returns the role of the training set from which a role of the batches takes its examples."""
    return "retain" if role == "retain_reference" else role


def _modality_length(example: Example) -> int:
    """Returns the number of words of an example, negative if it has no image."""
    texts = [*(text for turn in example.history for text in (turn.question, turn.answer))]
    texts += [example.question, example.answer]
    words = sum(len(text.split()) for text in texts)
    return words if example.image is not None else -words


def grouped_order(lengths: Sequence[int], layout: BatchLayout, draw: random.Random) -> list[int]:
    """Returns a random order whose batches contain one modality, and have similar lengths on all processes.

    The samples of a modality are shuffled and split into groups of one batch for each process and accumulation step. A
    group is sorted by length, and dealt to batches so that their lengths are balanced. The groups of both modalities
    are shuffled. Their incomplete last groups come at the end, as one group.

    Args:
        lengths: The length of each sample, negative without an image.
        layout: How samples are split into batches.
        draw: The source of random numbers.
    """
    chunks = layout.processes * layout.accumulation_steps
    size = layout.batch_size * chunks
    with_image = [index for index, length in enumerate(lengths) if length > 0]
    without = [index for index, length in enumerate(lengths) if length <= 0]
    modalities = [modality for modality in (with_image, without) if modality]
    shuffled = [_grouped_by_length(modality, lengths, size, chunks, draw) for modality in modalities]
    if len(shuffled) == 1:
        return shuffled[0]
    groups = [[order[start : start + size] for start in range(0, len(order), size)] for order in shuffled]
    complete = [group for modality in groups for group in modality[:-1]]
    draw.shuffle(complete)
    complete.append(sorted(index for modality in groups for index in modality[-1]))
    return [index for group in complete for index in group]


def _grouped_by_length(
    indices: Sequence[int], lengths: Sequence[int], size: int, chunks: int, draw: random.Random
) -> list[int]:
    """Returns shuffled indices in groups of a size, each sorted and dealt to chunks."""
    shuffled = list(indices)
    draw.shuffle(shuffled)
    order: list[int] = []
    for start in range(0, len(shuffled), size):
        group = sorted(shuffled[start : start + size], key=lambda index: -abs(lengths[index]))
        order += [index for chunk in _balanced_chunks(group, lengths, chunks) for index in chunk]
    return order


def _balanced_chunks(group: Sequence[int], lengths: Sequence[int], chunks: int) -> list[list[int]]:
    """Deals indices, the longest first, to chunks of one size: each to the shortest chunk that has room."""
    if len(group) % chunks:
        return [list(group[number::chunks]) for number in range(chunks)]
    dealt: list[list[int]] = [[] for _ in range(chunks)]
    for index in group:
        open_chunks = [chunk for chunk in dealt if len(chunk) < len(group) // chunks]
        min(open_chunks, key=lambda chunk: sum(abs(lengths[member]) for member in chunk)).append(index)
    return dealt


def count_warmup_steps(method: Method, ratio: float, steps: int) -> int:
    """Returns the number of warm-up steps. SafeEraser's code rounds it, transformers rounds it up."""
    return round(ratio * steps) if method.reproduced_code == "safe_eraser" else math.ceil(ratio * steps)


def repeat_scheduler_steps(method: Method, scheduler: LRScheduler, processes: int) -> None:
    """Changes a schedule to that of SafeEraser's code on several processes, if the method reproduces it.

    The code counts the steps of the schedule in optimizer steps, and accelerate then advances the schedule by the
    number of processes at each of them. On two processes, the cosine reaches 0 in the middle of the run and rises again
    to its peak.
    """
    if method.reproduced_code == "safe_eraser" and processes > 1 and isinstance(scheduler, LambdaLR):
        scheduler.lr_lambdas = [_Repeated(function, processes) for function in scheduler.lr_lambdas]


class _Repeated:
    """A schedule that advances several times at each step."""

    def __init__(self, function: object, times: int) -> None:
        self._function, self._times = function, times

    def __call__(self, step: int) -> float:
        factor: float = self._function(step * self._times)  # type: ignore[operator]
        return factor
