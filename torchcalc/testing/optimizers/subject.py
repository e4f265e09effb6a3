"""What the checks of an optimizer need: to build it anew with other options, to give it gradients, to see it move."""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from torchcalc.testing.optimizers.compare import parting
from torchcalc.testing.optimizers.noise import Silenced
from torchcalc.testing.optimizers.tensors import SHAPES, Grads, Play, clone, gradients, parameters, set_gradients
from torchcalc.testing.registry import Skip

__all__ = ["WAYS", "OptimizerSubject", "spelled"]

#: What says how a step is computed, and not what.
WAYS = ("foreach", "fused")


class OptimizerSubject:
    """An optimizer class or factory with the options under test."""

    def __init__(
        self,
        build: Callable[..., torch.optim.Optimizer],
        options: Mapping[str, Any] | None = None,
        reference: Callable[..., Any] | None = None,
        threshold: float | None = None,
        prepare: Callable[[Any], Any] | None = None,
    ) -> None:
        self.build, self.options = build, dict(options or {})
        self.reference, self.threshold, self.prepare = reference, threshold, prepare
        self.accepts = _accepted(build)
        self._takes: dict[tuple[int, ...], bool] = {}
        self.facts: dict[str, Any] = {}  # what checks found out about it, for others
        probe = [nn.Parameter(torch.zeros(2, 2))]
        try:
            self.example = self.make(probe)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{spelled(build)} cannot be built from parameters alone: {error}; "
                "pass what it needs as options=dict(lr=...), or a factory params -> optimizer"
            ) from error
        if not isinstance(self.example, torch.optim.Optimizer):
            raise TypeError(
                f"{spelled(build)} made a {type(self.example).__name__}, which is no torch.optim.Optimizer; "
                "pass an optimizer class or a factory params -> optimizer"
            )
        self.defaults = {k: v for k, v in self.example.param_groups[0].items() if k not in ("params", "param_names")}
        if self.defaults.get("differentiable"):
            raise ValueError(
                "with differentiable=True parameters may not be leaves, as they are in these checks; "
                "leave it out of the options: the check 'differentiable' tries it"
            )
        self.needs_closure = self._needs_closure()

    def _needs_closure(self) -> bool:
        """Whether step() fails where step(closure) does not: LBFGS, a line search."""
        failures = []
        for self.needs_closure in (False, True):
            p = nn.Parameter(torch.ones(2, 2))
            try:
                self.step(self.make([p]), [p], [torch.ones(2, 2)])
            except Exception as error:
                failures.append(error)
            else:
                return self.needs_closure
        remedy = "if it must be switched on first, pass prepare="
        if self.prepare or "dense" in str(failures[0]):
            remedy = "there are no checks for that"
        raise ValueError(f"{self.name} cannot take a step by a dense gradient: {failures[0]}; {remedy}") from failures[
            0
        ]

    @functools.cached_property
    def is_random(self) -> bool:
        """Whether bfloat16 steps differ from run to run, as stochastic rounding does."""
        if torch.bfloat16 not in self.dtypes:
            return False
        params = [nn.Parameter(torch.linspace(0.5, 2, 64, dtype=torch.bfloat16).reshape(8, 8))]
        grads = gradients(params, 2)
        runs = [self.trial(params, grads) for _ in range(3)]
        return any(not torch.equal(runs[0][-1][0], run[-1][0]) for run in runs[1:])

    @functools.cached_property
    def is_noisy(self) -> bool:
        """Whether its steps are others when torch's random numbers are at their mean, as in Langevin dynamics."""
        params = self.parameters()
        grads = gradients(params, 2)
        runs = []
        for mode in (contextlib.nullcontext(), contextlib.nullcontext(), Silenced()):
            with torch.random.fork_rng(devices=[]), mode:
                torch.default_generator.manual_seed(0)
                runs.append(self.trial(params, grads)[-1])
        same, quiet = (all(map(torch.equal, runs[0], run)) for run in runs[1:])
        finite = all(bool(x.isfinite().all()) for x in runs[2])
        return same and not quiet and finite  # what is not finite without noise cannot be checked so

    @functools.cached_property
    def elementwise(self) -> bool:
        """Whether an element steps by its own gradients alone, and in the same way wherever it lies."""
        shape = self.shapes(((12,),))[0]
        (p,) = parameters((shape,), self.exact)
        grads = [g for (g,) in gradients([p], 4) if g is not None]
        half = shape[0] // 2
        if half == 0:
            return False
        whole = [x for (x,) in self.trial([p], [[g] for g in grads])]
        mirrored = [x for (x,) in self.trial([p.flip(0)], [[g.flip(0)] for g in grads])]
        try:
            low, high = (self.trial([p[part]], [[g[part]] for g in grads]) for part in (slice(half), slice(half, None)))
        except (RuntimeError, ValueError):
            return False
        expected: Play = [[x, x] for x in whole]
        found: Play = [[x.flip(0), torch.cat(a + b)] for x, a, b in zip(mirrored, low, high, strict=True)]
        return parting(expected, found) is None

    @property
    def name(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{spelled(self.build)}({given})"

    @property
    def lr(self) -> float:
        """The step size under test; a check that needs one skips an optimizer without."""
        if not self.has_lr:
            raise Skip(f"its lr is {self.defaults['lr']!r}" if "lr" in self.defaults else "its groups have no lr")
        return float(self.defaults["lr"])

    @property
    def has_lr(self) -> bool:
        return isinstance(self.defaults.get("lr"), int | float | Tensor)

    def has(self, option: str) -> bool:
        """Whether the constructor or the groups know the option."""
        return option in self.accepts or option in self.defaults

    def make(self, params: Any, **override: Any) -> torch.optim.Optimizer:
        """The optimizer with its options, prepared; what a factory does not take goes into the parameter groups."""
        return self.prepared(self._make(params, **override))

    def prepared(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        if self.prepare is not None:
            self.prepare(optimizer)
        return optimizer

    def _make(self, params: Any, **override: Any) -> torch.optim.Optimizer:
        options = {**copy.deepcopy(self.options), **override}
        own = {k: v for k, v in options.items() if k in self.accepts or k in self.options}
        rest = {k: v for k, v in options.items() if k not in own}
        params = list(params) if not isinstance(params, Tensor) else params
        grouped = bool(len(params)) and isinstance(params[0], dict)
        groups = params if grouped else [{"params": params}]
        try:
            return self.build([{**rest, **group} for group in groups] if rest else params, **own)
        except TypeError as error:
            if isinstance(self.build, type) or not (rest or grouped):
                raise
            if grouped:
                raise Skip(f"its factory makes its own groups: {error}") from error
        optimizer = self.build(params, **own)
        for group in optimizer.param_groups:
            group.update(rest)
        return optimizer

    def ways(self) -> list[dict[str, Any]]:
        """How a step can be computed: as pinned by the options, else every way that the constructor knows."""
        if any(self.options.get(way) is not None for way in WAYS) or not any(way in self.accepts for way in WAYS):
            return [{}]
        loop = {way: False for way in WAYS if way in self.accepts}
        return [loop, *({**loop, way: True} for way in loop)]

    def with_reference_way(self) -> dict[str, Any]:
        """The loop over tensors, where the constructor can be told to."""
        return {way: False for way in WAYS if way in self.accepts}

    def each_way(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """(" with fused=True", options) for every way that can be built."""
        for way in self.ways():
            try:
                self.make(parameters(((2, 2),)), **way)
            except (RuntimeError, ValueError):
                if way != self.ways()[0]:
                    continue
                raise
            on = [k for k, v in way.items() if v]
            yield (f" with {on[0]}=True" if on else ""), way

    def shapes(self, wanted: Sequence[tuple[int, ...]] = SHAPES) -> tuple[tuple[int, ...], ...]:
        """Those of the shapes that it takes: Muon, say, wants matrices."""
        return self._taken(tuple(wanted)) or self._taken(((3, 4), (4, 5), (2, 3)))

    def _taken(self, wanted: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
        for shape in wanted:
            if shape not in self._takes:
                try:
                    self.make(parameters((shape,)))
                except (RuntimeError, ValueError):
                    self._takes[shape] = False
                else:
                    self._takes[shape] = True
        return tuple(shape for shape in wanted if self._takes[shape])

    def parameters(self, dtype: torch.dtype | None = None, seed: int = 0) -> list[nn.Parameter]:
        return parameters(self.shapes(), dtype or self.exact, seed)

    @functools.cached_property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """Those in which it takes a step, the most precise one first; all, if it takes none."""
        every = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
        return tuple(dtype for dtype in every if self._steps_in(dtype)) or every

    def _steps_in(self, dtype: torch.dtype) -> bool:
        params = parameters(self.shapes(), dtype)
        try:
            self.trial(params, gradients(params, 1))
        except Exception:  # however it refuses
            return False
        return True

    @property
    def exact(self) -> torch.dtype:
        """The dtype of most checks: float64 where it is taken."""
        return self.dtypes[0]

    def step(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> None:
        """One step with these gradients; through a closure, of a linear loss, where the optimizer needs one."""
        set_gradients(params, grads)
        if not self.needs_closure:
            optimizer.step()
            return

        def closure() -> float:
            set_gradients(params, grads)
            pairs = [(p.detach(), g) for p, g in zip(params, grads, strict=True) if g is not None]
            return sum(float((p * g.conj()).sum().real) for p, g in pairs)

        optimizer.step(closure)

    def play(self, optimizer: torch.optim.Optimizer, params: Sequence[Tensor], grads: Grads) -> Play:
        """Step through the gradients; what the parameters were."""
        seen = [clone(params)]
        for step in grads:
            self.step(optimizer, params, step)
            seen.append(clone(params))
        return seen

    def trial(self, params: Sequence[Tensor], grads: Grads, **override: Any) -> Play:
        """Play with copies of these parameters and a new optimizer."""
        mine = [nn.Parameter(p.detach().clone()) for p in params]
        return self.play(self.make(mine, **override), mine, grads)


def _accepted(build: Callable[..., Any]) -> frozenset[str]:
    """The names of the options that the constructor, or the factory, takes."""
    names: set[str] = set()
    chain: Iterable[Any] = (build,)
    if isinstance(build, type):
        chain = [
            vars(c)["__init__"] for c in build.__mro__[:-1] if "__init__" in vars(c) and c is not torch.optim.Optimizer
        ]
    for init in chain:
        parameters = list(inspect.signature(init).parameters.values())
        names.update(p.name for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            break
    return frozenset(names - {"self", "params"} - _first(build))


def _first(build: Callable[..., Any]) -> set[str]:
    """The name under which a factory takes the parameters."""
    parameters = list(inspect.signature(build).parameters.values())
    return {parameters[0].name} if parameters else set()


def spelled(build: Callable[..., Any]) -> str:
    """A name for the optimizer: torch.optim.AdamW as torch.optim.AdamW."""
    if isinstance(build, functools.partial):
        return spelled(build.func)
    name = getattr(build, "__qualname__", type(build).__name__)
    module = getattr(build, "__module__", "")
    if module.startswith(("torch.optim.", "torchcalc.optim.")):
        module = module.rpartition(".")[0]
    return f"{module}.{name}".removeprefix("builtins.")
