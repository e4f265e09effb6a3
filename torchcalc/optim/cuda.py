"""A step on a GPU: one launch for all tensors of a group, and nothing that waits for the device.

A :class:`Plan` remembers, for the parameters of a group that have a gradient, what does not change between steps: which tensors
a kernel takes, where they lie, which blocks they have. Each step checks that this still holds, and hands over the addresses
of the gradients where they differ from the last step's. What a kernel does not take (sparse or complex tensors, strides
that differ, subclasses) is left to the rule; so is a whole step that needs the norm of such gradients.

``state["step"]`` of all parameters of a group are views of one vector, so that they are counted at once. The vector is on the
device where torch keeps them there (capturable, fused), and where a step may be skipped without the host's knowledge.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import is_, itemgetter
from typing import Any

import torch
from torch import Tensor

from torchcalc.formula.rule import record
from torchcalc.formula.triton import ELEMENTS, compute_type
from torchcalc.native import gpu, pointwise
from torchcalc.optim import cuda_kernels as kernels
from torchcalc.optim.cuda_kernels import BLOCK, LANES, Way
from torchcalc.optim.extras import NORMAL, Scaling, draw_seed

__all__ = ["Memory", "check_graph_capture", "is_wanted", "skipped_steps", "step"]

PLAIN = (Tensor, torch.nn.Parameter)
NUMBERS = {float, int, bool, type(None)}  # and flags
MOST_PLANS = 8  # remembered for each group, where the parameters that have a gradient change from step to step
#: Programs of a norm, for each table.
NORM_PROGRAMS = 1024


class Memory:
    """What is kept from step to step. An optimizer drops it when its state is loaded or set anew."""

    def __init__(self, before: Memory | None = None) -> None:
        self.plans: dict[tuple[int, bytes], Plan | None] = {}  # by group, and by which parameters have a gradient
        self.counters: dict[tuple[Any, ...], Counter] = {}  # by group, device, and key unless it is the step
        self.controls: dict[torch.device, Control] = {}
        self.last: dict[int, Plan] = {}  # by group: that of the last step
        self.states: list[dict[str, Any]] = []
        self.capturing = False  # a CUDA graph, during this step
        self.captured: list[Any] = []  # what CUDA graphs read and write: as long as the optimizer lives
        if before is not None:
            self.captured = [*before.captured, before.controls]

    def counter(
        self, key: tuple[Any, ...], length: int, device: torch.device, dtype: torch.dtype, on_device: bool
    ) -> Counter:
        """The one of that key, made anew where it does not fit."""
        found = self.counters.get(key)
        if found is None or not found.fits(length, on_device, dtype):
            found = self.counters[key] = Counter(length, device, dtype, on_device)
        return found

    def forget(self) -> None:
        """Drop the plans."""
        self.plans.clear()
        self.last.clear()
        self.states = []


class Unfit(Exception):
    """A kernel cannot do this step; nothing has been changed."""


def is_wanted(optimizer: Any) -> bool:
    """Whether some parameters are on a device where kernels run."""
    if torch.compiler.is_compiling():
        return False
    for group in optimizer.param_groups:
        for p in group["params"]:
            if p.is_cuda or gpu.INTERPRETED:
                return gpu.takes(p.device)
            break
    return False


def goes(group: dict[str, Any]) -> bool:
    """Whether the group's options leave the choice."""
    return group["foreach"] is None and group.get("fused") in (None, True) and not group["differentiable"]


def step(optimizer: Any, memory: Memory, grad_scale: Tensor | None, found_inf: Tensor | None) -> bool:
    """One step; False if it is left to the rule, untouched.

    A step that must know something of all gradients goes by kernels only if they take all of them, on one device.
    """
    measured = optimizer.max_norm is not None or optimizer.skip_nonfinite
    controlled = measured or grad_scale is not None or found_inf is not None
    skips = optimizer.skip_nonfinite or found_inf is not None
    memory.capturing = gpu.capturing()
    if not controlled and not memory.capturing and optimizer.rounding == "nearest" and _again(optimizer, memory):
        return True
    known = _same(memory.states, optimizer.state)
    if not known:
        memory.forget()
    work: list[tuple[dict[str, Any], Plan | None, Callable[[Scaling], None] | None]] = []
    devices: set[torch.device] = set()
    for index, group in enumerate(optimizer.param_groups):
        plan = _plan(optimizer, memory, index, group, skips) if goes(group) else None
        if plan is not None:
            work.append((group, plan, None))
            devices |= plan.devices
        elif not controlled:
            work.append((group, None, optimizer._prepare(index, group)))
        elif any(p.grad is not None for p in group["params"]):
            return False
        if controlled and plan is not None and plan.rest:
            return False
    if not devices or (controlled and len(devices) > 1):
        return False
    device = next(iter(devices))
    if any(t is not None and t.device != device for t in (grad_scale, found_inf)):
        return False
    try:
        values = [None if plan is None else plan.values(optimizer, group) for group, plan, _ in work]
    except Unfit:
        return False
    if not known or len(memory.states) != len(optimizer.state):
        memory.states = list(optimizer.state.values())
    optimizer._note_plans()
    seed = draw_seed() if optimizer.rounding == "stochastic" else None
    batches: list[Batch] = []
    for _, plan, _ in work:
        if plan is not None:
            batches += plan.batches
            for batch in plan.batches:
                batch.hand_over(plan.grads, memory)
    control = counter = None
    # A graph holds one seed, to which it adds a count of its replays. The steps before it find the kernels compiled for that.
    counted = seed is not None and (
        memory.capturing or any(group.get("capturable") for group in optimizer.param_groups)
    )
    if controlled or counted:
        if device not in memory.controls:
            memory.controls[device] = Control(device)
        both = memory.controls[device]
        both.finish(optimizer, batches, grad_scale, found_inf, counted, measured)
        control = both if controlled else None
        counter = both if counted else None
    for (group, plan, rule), value in zip(work, values, strict=True):
        scaling = NORMAL if seed is None else Scaling(seed=seed)
        if plan is None:
            assert rule is not None
            rule(scaling)
        else:
            assert value is not None
            plan.run(optimizer, group, value, scaling, control, counter)
        if seed is not None:
            seed += 1  # one for each group: a kernel counts the places within its group only
    return True


def _again(optimizer: Any, memory: Memory) -> bool:
    """The last step once more, where every group goes by the plan that the nodes watch and nothing else is asked for."""
    if not _same(memory.states, optimizer.state):
        return False
    ready = []
    for index, group in enumerate(optimizer.param_groups):
        plan = memory.last.get(index)
        if plan is None or not goes(group) or not plan.still_holds(group, tuple(optimizer.slots(group).values())):
            return False
        try:
            ready.append((group, plan, plan.values(optimizer, group)))
        except Unfit:
            return False
    for group, plan, values in ready:
        for batch in plan.batches:
            batch.hand_over(plan.grads, memory)
        plan.run(optimizer, group, values, NORMAL, None, None)
    return bool(ready)


def skipped_steps(memory: Memory) -> int:
    """How many steps kernels have skipped; waits for the device."""
    return sum(int(control.skipped.item()) for control in memory.controls.values())


def _plan(optimizer: Any, memory: Memory, index: int, group: dict[str, Any], skips: bool) -> Plan | None:
    """The plan for the parameters of a group that have a gradient; None if the rule does the group.

    skips: whether the step may be skipped.
    """
    keys = tuple(optimizer.slots(group).values())
    last = memory.last.get(index)
    if last is not None and not memory.capturing and last.still_holds(group, keys):
        return last
    params, pattern = group["params"], b""
    found = [p.grad for p in params]
    grads = [g for g in found if g is not None]
    if not grads or (skips and _counts_itself(optimizer)):
        return None
    if len(grads) != len(params):
        pattern = bytes([g is not None for g in found])
        params = [p for p, g in zip(params, found, strict=True) if g is not None]
    key = index, pattern
    plan = memory.plans.get(key)
    if plan is None or not plan.holds(group, params, grads, keys):
        if memory.capturing:  # what a plan keeps on the device comes from the host
            return None
        # A first step may have another formula, and if it is skipped it must leave no state: the rule does it.
        if (skips or _uses_first(optimizer)) and not _has_state(optimizer, params, keys):
            return None
        entries = optimizer._entries(group, params)
        if len(memory.plans) >= MOST_PLANS * len(optimizer.param_groups):
            memory.forget()
        plan = memory.plans[key] = Plan(optimizer, memory, index, group, entries, keys)
    elif memory.capturing and "capturable" in optimizer.defaults:
        check_graph_capture(optimizer)
    if not plan.batches:
        return None
    memory.last[index] = plan
    return plan


def _has_state(optimizer: Any, params: list[Tensor], keys: tuple[str, ...]) -> bool:
    states = [optimizer.state.get(p, {}) for p in params]
    return all(state.get(key) is not None for state in states for key in keys)


def _uses_first(optimizer: Any) -> bool:
    """Whether the rule has arguments besides t that differ between parameters."""
    advance: object = type(optimizer).advance
    return "torchcalc.optim.optimizer" != getattr(advance, "__module__", "")


def _counts_itself(optimizer: Any) -> bool:
    """Whether the rule keeps other numbers beside its steps, as NAdam and ASGD do: a kernel cannot count for it."""
    return bool(optimizer.counts_steps and _uses_first(optimizer))


class Batch:
    """Tensors that one launch steps: of one device, with the same dtypes; and their table in device memory."""

    def __init__(self, entries: list[Any], places: list[int], aligned: bool) -> None:
        """Args: entries of the driver, their places among the plan's gradients, whether all are aligned."""
        first = entries[0]
        self.device: torch.device = first.p.device
        self.dtypes = tuple(t.dtype for t in (first.p, first.g, *first.slots))
        self.type_ = compute_type(self.dtypes)
        self.places, self.aligned = places, aligned
        self.params = [e.p for e in entries]
        rows = [[e.p.data_ptr(), *(s.data_ptr() for s in e.slots), e.p.numel()] for e in entries]
        counts = [-(-e.p.numel() // BLOCK) for e in entries]
        self.width = len(rows[0])
        self.programs = sum(counts)
        sizes = torch.tensor(counts, device="cpu")
        starts = (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        number = torch.arange(len(entries), dtype=torch.int32, device="cpu")
        self.tensors = number.repeat_interleave(sizes).to(self.device)
        self.blocks = (torch.arange(self.programs, device="cpu") - starts).int().to(self.device)
        self.table = torch.tensor(rows, dtype=torch.int64, device="cpu").to(self.device)
        self.grads: Tensor | None = None
        self.addresses: tuple[int, ...] = ()
        self.stream = gpu.stream(self.device)
        self.step_places: list[int] = []  # among the group's step counts
        self.steps = number.to(self.device)  # the same, on the device
        self.rows: dict[int, Tensor] = {}
        self.kernels: dict[Any, Any] = {}

    def hand_over(self, addresses: tuple[int, ...], memory: Memory) -> None:
        """The addresses of all gradients of the plan, if they differ from those that the device knows."""
        if len(self.places) != len(addresses):
            addresses = tuple([addresses[i] for i in self.places])
        stream = gpu.stream(self.device)
        known = addresses == self.addresses and stream == self.stream
        if memory.capturing:
            if not known:
                # A graph would read the host's memory at each replay: it holds the addresses themselves instead.
                size = kernels.ADDRESSES
                padded = (*addresses, *[0] * (-len(addresses) % size))
                self.grads, self.addresses = torch.empty(len(padded), dtype=torch.int64, device=self.device), ()
                for i in range(0, len(padded), size):
                    kernels.copy_addresses().launch(self.device, 1, [self.grads], (i, *padded[i : i + size]))
            memory.captured += [self, self.grads]
        elif not known:
            host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=self.device.type == "cuda")
            self.grads = host.to(self.device, non_blocking=True)  # a new one: the old one may still be read
            self.addresses, self.stream = addresses, stream

    def row(self, width: int) -> Tensor:
        if width not in self.rows:
            dtype = torch.float64 if self.type_ == "fp64" else torch.float32
            self.rows[width] = torch.empty(max(1, len(self.places) * width), dtype=dtype, device=self.device)
        return self.rows[width]

    def norm_programs(self) -> int:
        return min(self.programs, NORM_PROGRAMS)


class Plan:
    """How the parameters of a group that have a gradient are stepped: in which batches, and which are left to the rule."""

    def __init__(
        self,
        optimizer: Any,
        memory: Memory,
        index: int,
        group: dict[str, Any],
        entries: list[Any],
        keys: tuple[str, ...],
    ) -> None:
        self.keys, self.counts_itself = keys, _counts_itself(optimizer)
        self.counts = optimizer.counts_steps and not self.counts_itself
        self.options = _options(group)
        self.rest: list[int] = []
        batches: dict[Any, list[int]] = {}
        for i, e in enumerate(entries):
            tensors = (e.p, e.g, *e.slots)
            if _is_taken(tensors):
                aligned = all(t.data_ptr() % 16 == 0 for t in tensors)
                batches.setdefault((e.p.device, tuple(t.dtype for t in tensors), aligned), []).append(i)
            else:
                self.rest.append(i)
        self.batches: list[Batch] = [
            Batch([entries[i] for i in places], places, key[-1]) for key, places in batches.items()
        ]
        self.counters: dict[torch.device, Counter] = {}
        self.scalars: dict[str, Counter] = {}  # of a rule that counts itself; and what they are after this step
        self.next: dict[str, Tensor] = {}
        kept = tuple(optimizer.scalars) if self.counts_itself else ("step",) * self.counts
        if self.counts:
            self._count(optimizer, memory, index, group, entries)
        elif self.counts_itself:
            self._keep(optimizer, memory, index, group, entries)
        self.params = [e.p for e in entries]
        self.states = [e.state for e in entries]
        taken = sorted(i for batch in self.batches for i in batch.places)
        self.taken = taken if self.rest else None  # None for all
        with_step = (*keys, *kept)
        self.read = itemgetter(*with_step) if len(with_step) > 1 else lambda state: [state[k] for k in with_step]
        self.objects = list(self._objects(self.params))
        self.fixed = [t for i in taken for t in (entries[i].p, *entries[i].slots)]
        self.addresses = [t.data_ptr() for t in self.fixed]
        self.numels = [entries[i].g.numel() for i in taken]
        strided = [i for i in taken if not entries[i].g.is_contiguous()]
        self.contiguous = not strided
        self.strides = [entries[i].g.stride() for i in taken]
        self.unaligned = any(not batch.aligned for batch in self.batches)
        self.looks = [_look(entries[i].p) for i in self.rest]
        self.grads: tuple[int, ...] = ()  # where they are
        self._addressed([e.g for e in entries])
        self.devices = {batch.device for batch in self.batches}
        self.watch = self._watched(group, with_step)
        self.way: tuple[Any, Way] | None = None  # with the numbers that it is the way for
        for device in self.devices:
            if device.type == "cuda":
                prepare_for_graphs(device)
                torch.cuda.current_stream(device).synchronize()  # then the tables are there for every stream

    def _count(self, optimizer: Any, memory: Memory, index: int, group: dict[str, Any], entries: list[Any]) -> None:
        """Make the step counts of this plan's tensors views of the group's counters."""
        on_device = bool(group.get("capturable") or group.get("fused") or optimizer.skip_nonfinite)
        order = {id(p): i for i, p in enumerate(group["params"])}
        for batch in self.batches:
            ours = [entries[i] for i in batch.places]
            places = [order[id(e.p)] for e in ours]
            dtype = ours[0].state["step"].dtype
            counter = memory.counter((index, batch.device), len(order), batch.device, dtype, on_device)
            counter.take_in(places, [e.state for e in ours])
            self.counters[batch.device] = counter
            batch.steps = torch.tensor(places, dtype=torch.int32, device="cpu").to(batch.device)
            batch.step_places = places

    def _keep(self, optimizer: Any, memory: Memory, index: int, group: dict[str, Any], entries: list[Any]) -> None:
        """Likewise with all numbers of a rule that counts itself, on the host; where they are not, the rule does the group."""
        numbers = [e.state[key] for e in entries for key in optimizer.scalars]
        if self.rest or len(self.batches) != 1 or not all(x.is_cpu and not x.requires_grad for x in numbers):
            self.batches = []
            return
        (batch,) = self.batches
        order = {id(p): i for i, p in enumerate(group["params"])}
        batch.step_places = [order[id(entries[i].p)] for i in batch.places]
        for key in optimizer.scalars:
            dtype = entries[0].state[key].dtype
            counter = memory.counter((index, batch.device, key), len(order), batch.device, dtype, False)
            counter.take_in(batch.step_places, [entries[i].state for i in batch.places], key)
            self.scalars[key] = counter

    def _objects(self, params: list[Tensor]) -> Iterable[Any]:
        return chain(params, chain.from_iterable(map(self.read, self.states)))

    def _watched(self, group: dict[str, Any], keys: tuple[str, ...]) -> Any:
        """The same for the nodes, which look at all of it in a tenth of the time; None where they are not built."""
        if self.rest or (nodes := pointwise.rows()) is None:
            return None
        states = dict(zip(map(id, self.params), self.states, strict=True))
        each = [states.get(id(p)) for p in group["params"]]
        return nodes.watch(group["params"], each, keys, len(self.keys), not self.unaligned)

    def still_holds(self, group: dict[str, Any], keys: tuple[str, ...]) -> bool:
        """Whether this is the plan still, as far as the nodes can tell."""
        if self.watch is None or keys != self.keys or self.options != _options(group):
            return False
        addresses = pointwise.rows().look(self.watch, group["params"])
        if addresses is None:
            return False
        self.grads = addresses
        return True

    def holds(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], keys: tuple[str, ...]) -> bool:
        """Whether what the plan remembers is still so. This is most of what the host does in a step: hence the maps."""
        ours = grads if self.taken is None else [grads[i] for i in self.taken]
        try:
            holds = (
                keys == self.keys
                and self.options == _options(group)
                and len(params) == len(self.params)
                and all(map(is_, self._objects(params), self.objects))
                and list(map(Tensor.data_ptr, self.fixed)) == self.addresses
                and set(map(type, ours)) == {Tensor}
                and list(map(Tensor.numel, ours)) == self.numels
                and (
                    all(map(Tensor.is_contiguous, ours))
                    if self.contiguous
                    else list(map(Tensor.stride, ours)) == self.strides
                )
                and not any(map(Tensor.is_neg, ours))
                and (not self.rest or self.looks == [_look(params[i]) for i in self.rest])
            )
            return bool(holds) and self._addressed(grads)
        except (KeyError, RuntimeError):  # a slot was deleted; a gradient has become sparse
            return False

    def _addressed(self, grads: list[Tensor]) -> bool:
        """Read where the gradients are; False if they are no longer aligned."""
        if self.rest:
            kept = set(self.taken or ())
            addresses = tuple([g.data_ptr() if i in kept else 0 for i, g in enumerate(grads)])
        else:
            addresses = tuple(map(Tensor.data_ptr, grads))
        if addresses != self.grads:
            if not self.unaligned and any(a & 15 for a in addresses):
                return False
            self.grads = addresses
        return True

    def values(self, optimizer: Any, group: dict[str, Any]) -> tuple[Way, dict[str, Any]]:
        """The way through the rule, and the rule's numbers; tensors stay tensors where they are on the device."""
        arguments = optimizer.hyper(group)
        if self.counts:
            arguments["t"] = 1.0
        elif self.counts_itself:
            places = self.batches[0].step_places
            if not all(c.is_one() and len(c.active) == len(places) for c in self.scalars.values()):
                raise Unfit
            place = places[0]
            self.next = {key: counter.views[place].clone() for key, counter in self.scalars.items()}
            arguments |= optimizer.advance(self.next, group, arguments, False)
        elif _uses_first(optimizer):
            own = optimizer.advance({}, group, arguments, False)
            if own.keys() != {"first"}:
                raise Unfit
            arguments |= own
        types = tuple(map(type, arguments.values()))
        if not NUMBERS.issuperset(types):
            self._check_tensors(arguments)
            return _way(optimizer, tuple(optimizer.slots(group)), arguments, types), arguments
        key = types, *arguments.values()
        if self.way is None or self.way[0] != key:
            self.way = key, _way(optimizer, tuple(optimizer.slots(group)), arguments, types)
        return self.way[1], arguments

    def _check_tensors(self, arguments: dict[str, Any]) -> None:
        """Tensors on the host become numbers; raise where one is on another device, or has a gradient."""
        for name, x in arguments.items():
            if isinstance(x, Tensor):
                on_device = {x.device} == self.devices and x.dtype in ELEMENTS
                if x.numel() != 1 or x.requires_grad or not (on_device or x.is_cpu):
                    raise Unfit
                if not on_device:
                    arguments[name] = x.item()

    def run(
        self,
        optimizer: Any,
        group: dict[str, Any],
        values: tuple[Way, dict[str, Any]],
        scaling: Scaling,
        control: Control | None,
        counter: Control | None,
    ) -> None:
        way, arguments = values
        for key, counter_ in self.scalars.items():
            counter_.put(self.next[key])
        times: dict[torch.device, float | Tensor] = {}
        for device, steps in self.counters.items():
            batches = [batch for batch in self.batches if batch.device == device]
            places = batches[0].step_places if len(batches) == 1 else [i for each in batches for i in each.step_places]
            times[device] = steps.count(places)
        for batch in self.batches:
            time = times.get(batch.device)
            launch(way, arguments, batch, group["maximize"], time, control, scaling.seed, counter)
        if self.watch is not None:
            pointwise.rows().written(self.watch)
        for batch in self.batches:
            if self.watch is None:
                torch._C._increment_version(batch.params)  # autograd has not seen them written
            optimizer._stepped(batch.params)
        if self.rest:
            entries = optimizer._entries(group, self.params)
            optimizer._step_group(group, [entries[i] for i in self.rest], scaling)


def launch(
    way: Way,
    arguments: dict[str, Any],
    batch: Batch,
    maximize: bool,
    time: float | Tensor | None,
    control: Control | None,
    seed: int | None,
    counter: Control | None,
) -> None:
    """Step a batch.

    Args:
        time: t of all tensors; or the vector of step counts, which a kernel reads and counts; or None.
        control: what scales the gradients and may skip the step.
        counter: what counts the seeds of a CUDA graph.
    """
    parameters = way.recording.parameters
    given = [arguments[x] for x in parameters]
    by_rows = isinstance(time, Tensor) or not NUMBERS.issuperset(map(type, given))
    assert batch.grads is not None
    tensors = [batch.table, batch.grads, batch.tensors, batch.blocks]
    numbers: tuple[float, ...] = ()
    if time is not None:
        arguments["t"] = 1.0 if isinstance(time, Tensor) else time
    if by_rows:
        tensors.append(compute_rows(way, arguments, batch, time, control))
    else:
        numbers = way.host_numbers(batch.type_)(*[arguments[x] for x in parameters])
    if control is not None:
        tensors.append(control.values)
    if counter is not None:
        tensors.append(counter.counter)
    key = way, maximize, by_rows, control is None, seed is None, counter is None
    kernel = batch.kernels.get(key)
    if kernel is None:
        kernel = batch.kernels[key] = way.update(
            batch.dtypes,
            aligned=batch.aligned,
            maximize=maximize,
            by_rows=by_rows,
            controlled=control is not None,
            stochastic=seed is not None,
            counted=counter is not None,
        )
    kernel.launch(batch.device, batch.programs, tensors, numbers if seed is None else (*numbers, seed))


def compute_rows(
    way: Way, arguments: dict[str, Any], batch: Batch, time: float | Tensor | None, control: Control | None
) -> Tensor:
    """A row of numbers for each tensor, computed on the device, where some of what they are made of is."""
    step_type = ELEMENTS[time.dtype] if isinstance(time, Tensor) else None
    on_device = tuple(
        (x, ELEMENTS[arguments[x].dtype]) for x in way.recording.parameters if isinstance(arguments[x], Tensor)
    )
    kernel, given = way.row_numbers(batch.type_, on_device, step_type, control is not None)
    rows = batch.row(len(way.names(batch.type_)))
    tensors = [rows]
    if isinstance(time, Tensor):
        tensors += [time, batch.steps]
    if control is not None:
        tensors.append(control.values)
    tensors += [arguments[x] for x, _ in on_device]
    count = len(batch.places)
    kernel.launch(batch.device, -(-count // LANES), tensors, (count, *(arguments[x] for x in given)))
    return rows


_ways: dict[Any, Way | None] = {}


def _way(optimizer: Any, slots: tuple[str, ...], arguments: dict[str, Any], types: tuple[type, ...]) -> Way:
    """The way that the rule goes with these arguments, recorded once."""
    # What decides is which numbers are zero, and flags. A tensor is not asked, which would wait: it counts as not zero.
    known = [True if isinstance(a, Tensor) else bool(a) for a in arguments.values()]
    key = type(optimizer).rule, slots, types, *known
    if key not in _ways:
        try:
            plain = {x: 1.0 if isinstance(a, Tensor) else a for x, a in arguments.items()}
            _ways[key] = Way(record(type(optimizer).rule, slots, plain))
        except Exception:  # whatever a rule does that cannot be recorded: it runs as it is
            _ways[key] = None
    way = _ways[key]
    if way is None:
        raise Unfit
    return way


class Counter:
    """The step counts of a group's parameters on a device, or other numbers of its state: views of one vector."""

    def __init__(self, length: int, kernels_on: torch.device, dtype: torch.dtype, on_device: bool) -> None:
        self.vector = torch.zeros(length, dtype=dtype, device=kernels_on if on_device else "cpu")
        self.views = list(self.vector.unbind())
        self.active: set[int] = set()
        self.on_device, self.kernels_on = on_device, kernels_on
        self.time: float | None = None  # of all active ones, if it is the same
        self.version = -1

    def fits(self, length: int, on_device: bool, dtype: torch.dtype) -> bool:
        return len(self.views) == length and self.on_device == on_device and self.vector.dtype == dtype

    def take_in(self, places: list[int], states: list[dict[str, Any]], key: str = "step") -> None:
        for i, state in zip(places, states, strict=True):
            if state[key] is not self.views[i]:
                self.views[i].copy_(state[key])
                state[key] = self.views[i]
        self.active.update(places)
        self.version = -1

    def is_one(self) -> bool:
        """Whether all active ones are the same number."""
        if self.version != self.vector._version or self.time is None:
            values = self.vector.tolist()
            times = {values[i] for i in self.active}
            self.time = times.pop() if len(times) == 1 else None
            self.version = self.vector._version
        return self.time is not None

    def put(self, value: Tensor) -> None:
        """Set all active ones."""
        if len(self.active) == len(self.views):
            self.vector.copy_(value)
        else:
            self.vector[torch.tensor(sorted(self.active), device="cpu")] = value
        self.time, self.version = value.item(), self.vector._version

    def count(self, places: list[int]) -> float | Tensor:
        """t of this step for all these; or the vector, where a kernel counts, or where they differ."""
        if self.on_device:
            return self.vector
        if self.is_one() and len(places) == len(self.active):
            assert self.time is not None
            self.time += 1
            if len(self.active) == len(self.views):
                self.vector.fill_(self.time)  # a third of the time of adding a number
            else:
                self.vector += 1
            self.version = self.vector._version
            return self.time
        before = self.vector.clone()
        self.vector[torch.tensor(places, device="cpu")] += 1
        self.version = -1
        times = set(before[torch.tensor(places, device="cpu")].tolist())
        return times.pop() + 1 if len(times) == 1 else before.to(self.kernels_on)


class Control:
    """What a device knows of a step before it begins: the factor of all gradients, and whether to skip it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.values = torch.zeros(2, dtype=torch.float32, device=device)
        self.skipped = torch.zeros((), dtype=torch.int64, device=device)
        self.counter = torch.zeros((), dtype=torch.int64, device=device)
        self.partial = torch.empty(0, dtype=torch.float64, device=device)
        self.counted = False

    def finish(
        self,
        optimizer: Any,
        batches: Sequence[Batch],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        counted: bool,
        measured: bool,
    ) -> None:
        """Launch what computes it; the gradients' addresses have been handed over."""
        self.counted = counted
        clips = optimizer.max_norm is not None and optimizer.max_norm != math.inf
        tensors, count, block = [self.values], 0, 0
        if measured:
            count = sum(batch.norm_programs() for batch in batches)
            block = max(16, 1 << (count - 1).bit_length())
            if len(self.partial) < count:
                self.partial = torch.empty(block, dtype=torch.float64, device=self.device)
            first = 0
            for batch in batches:
                programs = batch.norm_programs()
                assert batch.grads is not None
                kernels.norm(batch.dtypes[1], batch.aligned).launch(
                    self.device,
                    programs,
                    [batch.table, batch.grads, batch.tensors, batch.blocks, self.partial],
                    (batch.width, first, batch.programs),
                )
                first += programs
            optimizer.grad_norm = torch.empty((), dtype=torch.float64, device=self.device)
            tensors += [self.partial, optimizer.grad_norm]
        skips = optimizer.skip_nonfinite
        tensors += [t for t in (grad_scale, found_inf) if t is not None]
        if skips:
            tensors.append(self.skipped)
        if counted:
            tensors.append(self.counter)
        kernel = kernels.finish(
            block,
            scaled=grad_scale is not None,
            found_inf=found_inf is not None,
            skips=skips,
            clips=clips,
            counts_seeds=counted,
        )
        kernel.launch(self.device, 1, tensors, (count, optimizer.max_norm if clips else 0.0))


# Parts that need nothing of a plan.


def _same(states: list[Any], now: dict[Tensor, Any]) -> bool:
    nodes = pointwise.rows()
    if nodes is not None:
        same: bool = nodes.same(states, now)
        return same
    return len(states) == len(now) and all(map(is_, states, now.values()))


def _options(group: dict[str, Any]) -> tuple[Any, ...]:
    """Options that decide where step counts are kept."""
    return group.get("capturable"), group.get("fused")


def _is_taken(tensors: Sequence[Tensor]) -> bool:
    """Whether a kernel takes p, g and the slots: plain, dense, on one device, lying alike."""
    p, g = tensors[0], tensors[1]
    if not all(type(t) in PLAIN and t.dtype in ELEMENTS and t.layout is torch.strided for t in tensors):
        return False
    if not gpu.takes(p.device) or g.dtype != p.dtype or p.numel() == 0:
        return False
    contiguous = p.is_contiguous()
    return gpu.is_dense(p) and all(
        t.device == p.device
        and t.shape == p.shape
        and (t.is_contiguous() if contiguous else t.stride() == p.stride())
        and not t.is_neg()
        for t in tensors
    )


@functools.cache
def prepare_for_graphs(device: torch.device) -> None:
    """Compile the kernel that only a step in a graph launches: nothing can be loaded during the capture."""
    scratch = torch.empty(kernels.ADDRESSES, dtype=torch.int64, device=device)
    kernels.copy_addresses().launch(device, 1, [scratch], (0, *[0] * kernels.ADDRESSES))


def check_graph_capture(optimizer: Any) -> None:
    """Raise where a CUDA graph would capture the numbers of one step."""
    check = getattr(optimizer, "_accelerator_graph_capture_health_check", None)  # its name from torch 2.11 on
    (check or optimizer._cuda_graph_capture_health_check)()


def _look(p: Tensor) -> list[Any]:
    """What a kernel that did not take p, with its gradient, may have minded: it is asked again once this changes."""
    return [
        (type(t), t.dtype, t.device, t.layout, t.stride() if t.layout == torch.strided else None)
        for t in (p, p.grad)
        if t is not None
    ]
