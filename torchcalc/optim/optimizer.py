"""The one driver of all optimizers: it owns the loop, the state, and what can go wrong; a subclass supplies the rule.

A *rule* is a static function ``rule(p, g, **slots, t, **hyper)`` of the formula alone. It writes to p and to its
slots (the state that has the parameter's shape), never to g. Written with the algebra of
:mod:`torchcalc.optim.tensor_list`, the same body runs on one tensor and on a list. A subclass names its slots and
hyperparameters and checks them; the driver does the rest: closures, lazily made state, parameters without a gradient
or with a first one late, groups, buckets of tensors that go together, complex and sparse tensors, shards of DTensors,
state in another dtype than its parameter, GradScaler, autograd through the step.

Which way a step goes, group by group:

=====================================  =================================================================================
``foreach=False`` (or fused=False)     tensor by tensor; in float32 and wider equal to torch's loop to the last bit
``foreach=True``                       one ``torch._foreach_*`` call per operation of the rule and bucket
default and fused on CUDA              one launch for all tensors (:mod:`torchcalc.optim.cuda`); without Triton, or for
                                       tensors that it does not take, as with foreach=True
``differentiable=True``                tensor by tensor, out of place, recorded by autograd
default and fused on CPU               the rule's kernel over all tensors at once (:mod:`torchcalc.optim.kernel`); where no
                                       kernels are built torch's fused operation, if there is one and it is right
                                       (:mod:`torchcalc.optim.fused`); for what these do not take, tensor by tensor
=====================================  =================================================================================

bfloat16 and float16 are computed in float32 and rounded once, whichever way a step goes (but for sparse gradients).
"""

from __future__ import annotations

import functools
import inspect
import operator
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
from torch import Tensor
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from torchcalc import native
from torchcalc.optim import cuda, fused, kernel
from torchcalc.optim.arguments import WHOLE
from torchcalc.optim.checkpoint import load_state_dict, state_dtype
from torchcalc.optim.checks import check_numbers, warn_of_misspelling
from torchcalc.optim.extras import (
    NORMAL,
    Scaling,
    check_extras,
    check_group_extras,
    clip_coefficient,
    draw_seed,
    global_norm,
    round_stochastically_,
)
from torchcalc.optim.native import DONE, Plan, is_wanted, leaves_the_choice
from torchcalc.optim.tensor_list import Recorded, TensorList

__all__ = ["Optimizer", "ParamsT"]

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]

HALVES = (torch.bfloat16, torch.float16)
MOST_WIDENED = 2**24  # elements of half type that are computed in float32 together, as lists
MOST_PLANS = 8  # remembered for each group, where the parameters that have a gradient change from step to step


def without_dynamo(method: Callable[..., Any]) -> Callable[..., Any]:
    """The method without the import of Dynamo, which takes a second.

    torch hides methods from Dynamo by a wrapper which imports it first. Nothing can be compiling before that import.
    """

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        return (method if "torch._dynamo" in sys.modules else inspect.unwrap(method))(*args, **kwargs)

    return call


_zero_grad = without_dynamo(torch.optim.Optimizer.zero_grad)


class Entry(NamedTuple):
    """One parameter that has a gradient."""

    p: Tensor
    g: Tensor
    slots: list[Tensor]
    state: dict[str, Any]
    first: bool  # its state was made just now


class Optimizer(torch.optim.Optimizer):
    """Base class: subclass it with a rule. See :class:`torchcalc.optim.Lion` for the shortest example.

    Args:
        params: parameters, named parameters, or dicts of parameter groups.
        defaults: what a group has that does not say otherwise; each value becomes one of the group.
        max_norm, skip_nonfinite, rounding: as for :class:`torchcalc.optim.Lion`.

    Raises:
        ValueError: an argument, also of a single group, out of range; found before anything is changed.

    >>> class Descent(Optimizer):
    ...     counts_steps = False
    ...     rule = staticmethod(lambda p, g, *, lr: p.add_(g, alpha=-lr))
    ...     def hyper(self, group):
    ...         return {"lr": group["lr"]}
    ...     def slots(self, group):
    ...         return {}
    ...     def check(self, group):
    ...         pass
    >>> p = torch.nn.Parameter(torch.tensor([1.0]))
    >>> p.grad = torch.tensor([2.0])
    >>> Descent([p], {"lr": 0.25, "foreach": None, "maximize": False, "differentiable": False}).step()
    >>> p.item()
    0.5
    """

    rule: ClassVar[Callable[..., None]]
    sparse_rule: ClassVar[Callable[..., None] | None] = None
    sparse_error: ClassVar[str] = ""
    counts_steps: ClassVar[bool] = True
    #: State that is one number for each parameter, and what it starts from; there is none unless steps are counted.
    scalars: ClassVar[dict[str, float]] = {"step": 0.0}
    #: Hyperparameters that checkpoints of old torch lack, and what they meant, in the order in which torch got them. A
    #: checkpoint that has one of them is too young to lack an earlier one: it is another optimizer's.
    added_later: ClassVar[dict[str, Any]] = {"maximize": False}
    #: Numbers of a group that advance or new_slot reads, besides those of hyper.
    numbers: ClassVar[tuple[str, ...]] = ()
    #: What capturable=True keeps on the device, in torch's words.
    on_device: ClassVar[str] = "params and state_steps"
    on_xla: ClassVar[bool] = True
    #: Options that change the formula, with a value for each way that the rule goes: every combination has a kernel, made
    #: from the rule when the kernels are built; see :mod:`torchcalc.optim.kernel`.
    variants: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    #: A kernel written by hand instead: native(bound, grads, group, first, scaling) -> status; see :mod:`torchcalc.native.optim`.
    native: Callable[..., int] | None = None
    #: torch's operation, where kernels are not built: torch_fused(params, grads, slots, steps, group, first); see
    #: :mod:`torchcalc.optim.fused`.
    torch_fused: Callable[..., None] | None = None

    #: Options that are the whole optimizer's, and no group's: attributes of the constructor's names.
    whole: ClassVar[tuple[str, ...]] = WHOLE

    #: ‖g‖ over all parameters at the last step, before clipping; needs max_norm or skip_nonfinite.
    grad_norm: float | Tensor | None

    def __init__(
        self,
        params: ParamsT,
        defaults: dict[str, Any],
        *,
        max_norm: float | None = None,
        skip_nonfinite: bool = False,
        rounding: str = "nearest",
    ) -> None:
        self.defaults = defaults
        self.check(defaults)
        check_extras(max_norm, skip_nonfinite, rounding)
        if defaults.get("differentiable") and (max_norm is not None or rounding != "nearest"):
            raise ValueError(
                "differentiable=True does not go with max_norm or rounding='stochastic': autograd would record "
                "neither; leave them out, and clip by differentiable operations before the step"
            )
        self.max_norm, self.skip_nonfinite, self.rounding = max_norm, skip_nonfinite, rounding
        self.grad_norm = None
        self._forget()
        super().__init__(params, defaults)
        if defaults.get("fused"):  # only then: with it Lightning refuses gradient_clip_val under 16-mixed
            self._step_supports_amp_scaling = True

    # What a subclass says.

    def check(self, group: dict[str, Any]) -> None:
        """Raise if a hyperparameter of the group is out of range."""
        raise NotImplementedError

    def hyper(self, group: dict[str, Any]) -> dict[str, Any]:
        """The rule's keyword arguments."""
        raise NotImplementedError

    def slots(self, group: dict[str, Any]) -> dict[str, str]:
        """The rule's slots, and the state keys where they are kept."""
        raise NotImplementedError

    def refuses_sparse(self, group: dict[str, Any]) -> str:
        """Why the group takes no sparse gradient; "" if it does."""
        return "" if self.sparse_rule else self.sparse_error

    def new_slot(self, key: str, p: Tensor, g: Tensor, group: dict[str, Any]) -> Tensor:
        """A slot at its parameter's first step."""
        return torch.zeros_like(p, memory_format=torch.preserve_format)

    def advance(
        self, state: dict[str, Any], group: dict[str, Any], hyper: dict[str, Any], first: bool
    ) -> dict[str, Any]:
        """Count the step; return the rule's arguments that differ between parameters. first: the slots are new."""
        if not self.counts_steps:
            return {}
        step = state["step"]
        if is_readable(step):
            t = step.item() + 1
            step.fill_(t)  # a third of the time of adding a number, which is made a tensor of the step's dtype first
            return {"t": t}
        if is_recorded(step):
            state["step"] = step + 1
        else:
            state["step"] += 1
        return {"t": read(state["step"])}

    # The driver.

    @staticmethod
    def profile_hook_step(func: Callable[..., Any]) -> Callable[..., Any]:
        """torch's wrapper of step for hooks and the profiler, left out where there are none: it costs 10 µs a call."""
        with_hooks = torch.optim.Optimizer.profile_hook_step(func)

        @functools.wraps(func)
        def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
            if (
                torch.autograd.profiler._is_profiler_enabled
                or self._optimizer_step_pre_hooks
                or self._optimizer_step_post_hooks
                or _global_optimizer_pre_hooks
                or _global_optimizer_post_hooks
            ):
                return with_hooks(self, *args, **kwargs)
            return func(self, *args, **kwargs)

        return step

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, checked like the constructor's arguments.

        The dict passed in is copied. A tensor lr that another group holds is copied too, so that each has its own.
        """
        if isinstance(param_group, dict):
            warn_of_misspelling(param_group, self.defaults)
            check_group_extras(param_group)
            param_group = {**self.defaults, **param_group}
            self.check(param_group)
            lr = param_group["lr"]
            if isinstance(lr, Tensor) and not lr.requires_grad and any(lr is g["lr"] for g in self.param_groups):
                param_group["lr"] = lr.clone()
        without_dynamo(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's. Here the optimizer lets go of what its owner may want back before the next step.

        A bound step holds its parameters: those of a group that is gone would stay in memory, and ``module.to()`` could not
        swap them.
        """
        if self._plans and (
            len(self.param_groups) != self._planned_groups or torch.__future__.get_swap_module_params_on_conversion()
        ):
            self._forget_plans()
        _zero_grad(self, set_to_none)

    state_dict = without_dynamo(torch.optim.Optimizer.state_dict)

    def _forget(self) -> None:
        """Drop what is remembered from step to step."""
        self._plans: dict[
            tuple[int, bytes], Plan | fused.Plan
        ] = {}  # by group, and by which of its parameters have a gradient
        self._states: list[dict[str, Any]] = []  # each parameter's state: the very dicts that the plans read
        self._new_plans = False
        self._planned_groups = 0
        self._memory = cuda.Memory(getattr(self, "_memory", None))
        self._skipped = 0
        self._fresh: dict[Tensor, list[str]] = {}  # keys of state that was made for the step that is under way

    @property
    def skipped_steps(self) -> int:
        """How many steps skip_nonfinite has left out. On a GPU reading it waits for the device."""
        return self._skipped + cuda.skipped_steps(self._memory)

    def __repr__(self) -> str:
        """torch's, and what the optimizer was told about all groups."""
        defaults = {**inspect.signature(Optimizer).parameters, **inspect.signature(type(self)).parameters}
        told = [f"    {k}: {v}\n" for k in self.whole if (v := getattr(self, k)) != defaults[k].default]
        return super().__repr__() if not told else f"{super().__repr__()[:-1]}All Groups\n{''.join(told)})"

    def __getstate__(self) -> dict[str, Any]:
        own = (*self.whole, "grad_norm", "skipped_steps")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def __setstate__(self, state: dict[str, Any]) -> None:
        skipped = state.get("skipped_steps", self.skipped_steps if "_memory" in self.__dict__ else 0)
        super().__setstate__({k: x for k, x in state.items() if k != "skipped_steps"})
        self._forget()
        self._skipped = skipped
        for group in self.param_groups:
            for name, default in self.defaults.items():
                group.setdefault(name, default)
        if self.defaults.get("fused"):
            self._step_supports_amp_scaling = True

    @without_dynamo
    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: dict[str, Any], *, strict: bool = True) -> None:
        """Load a state dict of this optimizer or of its torch twin: by name where names are known, else in order.

        Args:
            state_dict: what ``state_dict()`` returned; it is copied.
            strict: False: leave out what does not fit, with a warning that says what. A parameter that is left out keeps
                the state that it has.

        Raises:
            ValueError: groups, hyperparameters, names, slots or shapes do not fit. Nothing is changed then.
        """
        load_state_dict(self, state_dict, strict=strict)

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One optimization step.

        Args:
            closure: computes the loss and its gradients anew, and returns the loss.

        Returns:
            What the closure returned, or None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            self._step()
        return loss

    def _step(self) -> None:
        grad_scale = getattr(self, "grad_scale", None)  # GradScaler lends these two for the time of a fused step
        found_inf = getattr(self, "found_inf", None)
        if self._plans and not same(self._states, self.state.values()):
            self._plans.clear()
        try:
            if not (cuda.is_wanted(self) and cuda.step(self, self._memory, grad_scale, found_inf)):
                if self._fresh:
                    self._take_back()  # state that was made before the kernels declined
                self._step_groups(grad_scale, found_inf)
        except BaseException:
            self._take_back()
            raise
        # A compiled step has no plans, and Dynamo in torch 2.10 would break the graph at the question.
        if not torch.compiler.is_compiling() and torch.__future__.get_swap_module_params_on_conversion():
            self._forget_plans()  # module.to() swaps only tensors that nobody else holds, and a bound step holds them

    def _step_groups(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """The step of all groups, each its own way, unless GradScaler or skip_nonfinite leaves it out."""
        if found_inf is not None and found_inf.item():
            self._skipped += self.skip_nonfinite
            return
        scaling = self._scaling(grad_scale)
        if scaling is None:
            self._skipped += 1
            return
        steps = [self._prepare(i, group) for i, group in enumerate(self.param_groups)]  # each may raise; then all run
        self._note_plans()
        for step in steps:
            step(scaling)
            if scaling.seed is not None:  # one for each group: a kernel counts the places within its group only
                scaling = scaling._replace(seed=scaling.seed + 1)

    def _take_back(self) -> None:
        """A step has failed: state of parameters that it has not stepped is not there, so that the next one makes it."""
        for p, keys in self._fresh.items():
            for key in keys:
                self.state[p].pop(key, None)
            if not self.state[p]:
                del self.state[p]
        self._fresh.clear()
        self._forget_plans()

    def _stepped(self, params: Iterable[Tensor]) -> None:
        """These have been stepped: state that was made for them stays, whatever happens to others."""
        if self._fresh:
            for p in params:
                self._fresh.pop(p, None)

    def _forget_plans(self) -> None:
        self._plans.clear()
        self._states = []
        self._memory.forget()

    def _note_plans(self) -> None:
        if self._new_plans:
            self._new_plans, self._states = False, list(self.state.values())
            self._planned_groups = len(self.param_groups)

    def _scaling(self, grad_scale: Tensor | None) -> Scaling | None:
        """What max_norm, skip_nonfinite and rounding make of this step; None to skip it."""
        coefficient: float | Tensor = 1.0
        if self.max_norm is not None or self.skip_nonfinite:
            norm = global_norm([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
            self.grad_norm = norm.value if grad_scale is None else norm.value / float(grad_scale)
            if self.skip_nonfinite and not norm.finite:
                return None
            if self.max_norm is not None:
                coefficient = clip_coefficient(self.grad_norm, self.max_norm)
        seed = draw_seed() if self.rounding == "stochastic" else None
        if grad_scale is None and seed is None and self.max_norm is None:
            return NORMAL
        return Scaling(grad_scale, coefficient, seed)

    def _prepare(self, index: int, group: dict[str, Any]) -> Callable[[Scaling], None]:
        """Find out how the group goes, and raise if it cannot; the step itself is then run by what is returned."""
        params, pattern = group["params"], b""
        found = [p.grad for p in params]
        grads = [g for g in found if g is not None]
        if len(grads) != len(params):
            pattern = bytes([g is not None for g in found])
            params = [p for p, g in zip(params, found, strict=True) if g is not None]
        if not grads:
            return lambda scaling: None
        if not torch.compiler.is_compiling():
            hyper = self.hyper(group)
            check_numbers(index, {**hyper, **{key: group[key] for key in self.numbers}} if self.numbers else hyper)
        key = index, pattern
        if not is_wanted(group) or (self.native is None and not kernel.may_have_kernel(self, group)):
            if self.torch_fused is not None and leaves_the_choice(group) and not native.available():
                return self._prepare_fused(key, group, params, grads)
            entries = self._entries(group, params)
            return lambda scaling: self._step_group(group, entries, scaling)

        plan, made, first = self._plans.get(key), None, []
        keys = tuple(self.slots(group).values())
        if not isinstance(plan, Plan) or not plan.still_holds(group["params"], params, keys):
            made = self._entries(group, params)
            if len(self._plans) >= MOST_PLANS * len(self.param_groups):
                self._plans.clear()
            plan = self._plans[key] = Plan(made, keys, self.counts_steps, group["params"])
            self._new_plans = True
            first = [i for i, place in enumerate(plan.places) if made[place].first]

        def run(scaling: Scaling) -> None:
            rest: Sequence[int] = plan.rest
            kernel_grads = [grads[i] for i in plan.places] if rest else grads
            advanced: dict[int, dict[str, Any]] = {}  # what advance has returned, where it was called
            if kernel_grads:
                if self.native is not None:
                    status = self.native(plan.bound, kernel_grads, group, first, scaling)
                else:
                    counts = type(self).advance is Optimizer.advance
                    status, owns = kernel.step(
                        self, plan.bound, plan.kernel_states, kernel_grads, group, first, scaling, counts
                    )
                    advanced = dict(zip(plan.places, owns, strict=True)) if owns else {}
                if status != DONE:
                    self._plans.pop(key, None)  # a tensor has moved, or a gradient has other strides
                    rest = range(len(params))
                elif made:
                    self._stepped(made[i].p for i in plan.places)
            if rest:
                entries = made or self._entries(group, params)
                self._step_group(group, [entries[i] for i in rest], scaling, [advanced.get(i) for i in rest])

        return run

    def _entries(self, group: dict[str, Any], params: list[Tensor]) -> list[Entry]:
        """Parameters with their gradient and state. What it makes is taken back if this step fails."""
        grads = [p.grad for p in params if p.grad is not None]
        if (refused := self.refuses_sparse(group)) and any(g.is_sparse for g in grads):
            raise RuntimeError(refused)
        if group.get("fused"):
            check_fused(params)
        if "capturable" in self.defaults and not torch.compiler.is_compiling():
            if group["capturable"]:
                check_capturable(params, self.on_device, self.on_xla)
            if not params[0].is_cpu:
                cuda.check_graph_capture(self)
        keys = self.slots(group).values()
        entries = []
        for p, g in zip(params, grads, strict=True):
            state = self.state[p] if keys or self.counts_steps else {}
            missing = [key for key in keys if state.get(key) is None]
            uncounted = [key for key in self.scalars if key not in state] if self.counts_steps else []
            if missing or uncounted:
                self._fresh[p] = [*missing, *uncounted]
                state.update({key: new_scalar(self.scalars[key], p, group) for key in uncounted})
                state.update({key: self.new_slot(key, p, g, group) for key in missing})
            for key in keys:
                if state[key].dtype != p.dtype and (dtype := state_dtype(state[key], p)) != state[key].dtype:
                    state[key] = state[key].to(dtype)  # the parameter's dtype was changed
            entries.append(Entry(p, g, [state[key] for key in keys], state, first=bool(missing)))
        return entries

    def _prepare_fused(
        self, key: tuple[int, bytes], group: dict[str, Any], params: list[Tensor], grads: list[Tensor]
    ) -> Callable[[Scaling], None]:
        """Likewise where kernels are not built: by torch's own operation what it is right for, by the rule the rest."""
        plan, keys = self._plans.get(key), tuple(self.slots(group).values())
        remembered = isinstance(plan, fused.Plan) and plan.holds(params, keys) and plan.takes(grads)
        made = None if remembered else self._entries(group, params)

        def run(scaling: Scaling) -> None:
            if remembered and scaling is NORMAL:
                assert isinstance(plan, fused.Plan)
                return plan.step(self, group, grads)
            entries = made or self._entries(group, params)
            rest = fused.step(self, group, entries, scaling)
            if rest:
                self._step_group(group, rest, scaling)
            elif not remembered:
                self._plans[key] = fused.Plan(entries, keys, self.counts_steps)
                self._states, self._planned_groups = list(self.state.values()), len(self.param_groups)

        return run

    def _step_group(
        self,
        group: dict[str, Any],
        entries: list[Entry],
        scaling: Scaling,
        advanced: Sequence[dict[str, Any] | None] = (),
    ) -> None:
        """By the rule. advanced: what advance has returned for those entries where it was called already."""
        hyper = self.hyper(group)
        if "lr" in hyper:
            hyper["lr"] = live(to_scalar(hyper["lr"]))
        as_lists = goes_foreach(group, entries)
        buckets: dict[Any, list[tuple[Entry, list[Tensor], dict[str, Any]]]] = {}
        sharded: list[Tensor] = []
        widened = 0
        for i, e in enumerate(entries):
            own = advanced[i] if advanced else None
            scalars = self.advance(e.state, group, hyper, e.first) if own is None else own
            if group["differentiable"]:
                self._step_recorded(group, e, {**hyper, **scalars})
                self._stepped([e.p])
                continue
            tensors = local_shards([e.p, e.g, *e.slots])
            if tensors[0] is not e.p:
                sharded.append(e.p)
            if as_lists and scaling.seed is None and fits_a_list(tensors):
                numbers = tuple(None if isinstance(s, Tensor) else s for s in scalars.values())
                chunk = 0
                if tensors[0].dtype in HALVES:  # their float32 copies are made for so many elements at a time
                    widened += tensors[0].numel()
                    chunk = widened // MOST_WIDENED
                buckets.setdefault((e.p.device, e.p.dtype, numbers, chunk), []).append((e, tensors, scalars))
            else:
                self._step_one(group, tensors, {**hyper, **scalars}, scaling)
                self._stepped([e.p])
        for bucket in buckets.values():
            lists = [TensorList(ts) for ts in zip(*(tensors for _, tensors, _ in bucket), strict=True)]
            scalars = {k: stack([scalars[k] for *_, scalars in bucket]) for k in bucket[0][2]}
            if (
                "lr" in hyper and torch.compiler.is_compiling()
            ):  # Dynamo does not trace a Tensor divided by a TensorList
                scalars["lr"] = TensorList([hyper["lr"]] * len(bucket))
            if lists[0].dtype in HALVES:
                wide = [TensorList([t.float() for t in each.tensors]) for each in lists]
                self._apply(group, wide, {**hyper, **scalars}, scaling)
                for i, each in enumerate(lists):
                    if i != 1:
                        each.copy_(wide[i])
            else:
                self._apply(group, lists, {**hyper, **scalars}, scaling)
            self._stepped(e.p for e, *_ in bucket)
        if sharded and not torch.compiler.is_compiling():  # autograd has seen their shards written, and not them
            torch.autograd.graph.increment_version(sharded)

    def _apply(self, group: dict[str, Any], tensors: list[Any], args: dict[str, Any], scaling: Scaling) -> None:
        """Call the rule on [p, g, *slots], tensors or TensorLists; g scaled first, and negated to ascend."""
        p, g, *slots = tensors
        g = scaling.direction(g)
        if group["maximize"]:
            g = -g
        rule = self.sparse_rule if isinstance(g, Tensor) and g.is_sparse and self.sparse_rule else self.rule
        rule(p, g, **dict(zip(self.slots(group), slots, strict=True)), **args)

    def _step_one(self, group: dict[str, Any], tensors: list[Tensor], args: dict[str, Any], scaling: Scaling) -> None:
        """One parameter; halves in float32, mixed dtypes (state that was loaded, say) in the widest, rounded once at the end."""
        p = tensors[0]
        stochastic = scaling.seed is not None and p.dtype in HALVES
        least = p.dtype if tensors[1].is_sparse and not stochastic else computed_in(p)
        dtype = functools.reduce(torch.promote_types, (t.dtype for t in tensors), least)
        if all(t.dtype == dtype for t in tensors):
            return self._apply(group, tensors, args, scaling)
        wide = [t.to(dtype) for t in tensors]
        self._apply(group, wide, args, scaling)
        for i, (t, new) in enumerate(zip(tensors, wide, strict=True)):
            if i == 0 and stochastic:
                round_stochastically_(t, new)
            elif i != 1 and new is not t:
                t.copy_(new)

    def _step_recorded(self, group: dict[str, Any], e: Entry, args: dict[str, Any]) -> None:
        """differentiable=True: autograd needs the old values, so the rule makes new ones, which become the state."""
        if e.g.is_sparse:
            p, *slots = [t.clone() for t in (e.p, *e.slots)]
            self._apply(group, [p, e.g, *slots], args, NORMAL)
        else:
            tensors = (e.p, e.g, *e.slots)
            wide = computed_in(e.p)
            recorded = [
                Recorded(t.to(wide) if t.dtype in HALVES else t) for t in (e.p.clone(), *tensors[1:])
            ]  # p is written below
            self._apply(group, recorded, args, NORMAL)
            p, _, *slots = [
                torch.view_as_complex(r.tensor)
                if e.p.is_complex() and not r.tensor.is_complex()
                else r.tensor.to(t.dtype)
                for r, t in zip(recorded, tensors, strict=True)
            ]
        e.p.copy_(p)
        e.state.update(zip(self.slots(group).values(), slots, strict=True))


# Parts of the driver that need nothing of it.


def same(a: Collection[Any], b: Collection[Any]) -> bool:
    """Whether they hold the same objects."""
    return len(a) == len(b) and all(map(operator.is_, a, b))


def computed_in(p: Tensor) -> torch.dtype:
    """Halves are computed in float32 and rounded once, whichever way a step goes: their squares underflow."""
    return torch.float32 if p.dtype in HALVES else p.dtype


def to_scalar(x: Any) -> Any:
    """A 1-element tensor as a 0-dimensional one."""
    return x.squeeze() if isinstance(x, Tensor) and x.dim() != 0 else x


def live(lr: Any) -> Any:
    """Under torch.compile a tensor, which a scheduler may change without a compilation for each of its values.

    A sum, since torch's pass that keeps floats out of graphs (tensorify) knows no other way from a number to a tensor.
    """
    if torch.compiler.is_compiling() and not isinstance(lr, Tensor):
        return torch.zeros((), dtype=torch.float64, device="cpu") + lr
    return lr


def is_recorded(scalar: Tensor) -> bool:
    """Whether a derivative flows through a scalar of the state: with differentiable=True the state may be given."""
    return scalar.requires_grad and torch.is_grad_enabled()


def is_readable(scalar: Tensor) -> bool:
    """Whether it can be read without a synchronisation, and nobody records what is done with it."""
    return scalar.is_cpu and not torch.compiler.is_compiling() and not is_recorded(scalar)


def read(scalar: Tensor) -> Any:
    """A scalar of the state as a number; as a tensor where reading it would cost a synchronisation, a graph, or a
    derivative.

    That tensor has a number's precision: in float32, 1 − 0.999ᵗ would be wrong in the fifth digit at t = 1.
    """
    if is_readable(scalar):
        return scalar.item()
    return scalar if scalar.device.type == "mps" else scalar.double()  # MPS has no float64


def stack(scalars: list[Any]) -> Any:
    return TensorList(scalars) if isinstance(scalars[0], Tensor) else scalars[0]


def new_scalar(value: float, p: Tensor, group: dict[str, Any]) -> Tensor:
    """A scalar of the state: on the host, unless a kernel or a graph on the device reads it. torch's dtypes."""
    fused = group.get("fused")
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 and not fused else torch.float32
    return torch.tensor(value, dtype=dtype, device=p.device if group.get("capturable") or fused else "cpu")


def new_step(p: Tensor, group: dict[str, Any]) -> Tensor:
    return new_scalar(0.0, p, group)


def check_capturable(params: list[Tensor], on_device: str, on_xla: bool) -> None:
    from torch.optim.optimizer import _get_capturable_supported_devices

    supported = _get_capturable_supported_devices(supports_xla=on_xla)
    for p in params:
        if p.device.type not in supported:
            raise AssertionError(
                f"If capturable=True, {on_device} must be on supported devices: {supported}.; "
                f"a parameter is on {p.device}: pass capturable=False"
            )


def check_fused(params: list[Tensor]) -> None:
    supported = torch.utils._foreach_utils._get_fused_kernels_supported_devices()
    for p in params:
        if p.device.type not in supported or not p.is_floating_point():
            raise RuntimeError(
                "`fused=True` requires all the params to be floating point Tensors of supported devices: "
                f"{supported} but {p.dtype} and {p.device.type}; leave fused out"
            )


def goes_foreach(group: dict[str, Any], entries: list[Entry]) -> bool:
    if group["differentiable"]:
        return False
    if group["foreach"] is None and (group.get("fused") or group.get("fused") is None):
        tensor_lr = isinstance(group["lr"], Tensor) and not group.get("capturable")
        return not tensor_lr and all(e.p.is_cuda for e in entries)
    return bool(group["foreach"])


def fits_a_list(tensors: list[Tensor]) -> bool:
    """Whether [p, g, *slots] may stand in TensorLists beside others': plain dense tensors of one dtype."""
    return all(
        type(t) in (Tensor, torch.nn.Parameter) and not t.is_sparse and t.dtype == tensors[0].dtype for t in tensors
    )


def local_shards(tensors: list[Tensor]) -> list[Tensor]:
    """p, g and slots; as local shards where they are DTensors, since rules are elementwise. g goes where its weight is."""
    distributed = sys.modules.get("torch.distributed.tensor")
    if distributed is not None and all(isinstance(t, distributed.DTensor) for t in tensors):
        p, g, *slots = cast("list[Any]", tensors)
        placements = p.placements
        if all(t.placements == placements for t in slots) and not any(x.is_partial() for x in placements):
            return [t._local_tensor for t in (p, g.redistribute(placements=placements), *slots)]
    return tensors
