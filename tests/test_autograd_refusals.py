"""What cannot be right raises: wrong definitions, missing derivatives, tensors that torch would not see."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from torchcalc.autograd import Function


def vector(requires_grad=False, n=3):
    x = torch.linspace(0.5, 2.0, n, dtype=torch.float64)
    return x.requires_grad_() if requires_grad else x


def define(**methods):
    static = {k: staticmethod(v) if callable(v) and k != "bound" else v for k, v in methods.items()}
    return type("Wrong", (Function,), static)


@pytest.mark.parametrize(
    ("methods", "text"),
    [
        ({"forward": lambda ctx, x: x}, "Wrong.forward takes ctx; write forward"),
        ({"backward": torch.autograd.function.once_differentiable(lambda ctx, g: g)}, "once_differentiable"),
        ({"autocast": "fp16"}, "'fp16'; use one of"),
    ],
)
def test_definitions_that_cannot_work_are_refused(methods, text):
    with pytest.raises(TypeError, match=text):
        define(**methods)


@pytest.mark.parametrize("name", ["forward", "setup_context", "backward", "jvp", "vmap"])
def test_methods_that_are_not_static_are_refused(name):
    for method in (lambda *args: None, classmethod(lambda *args: None)):
        with pytest.raises(TypeError, match=rf"Wrong.{name} must be a static method"):
            type("Wrong", (Function,), {name: method})


FORMS = {
    "eager": lambda f, x: torch.autograd.grad(f(z := x.clone().requires_grad_()).sum(), z),
    "double": lambda f, x: torch.autograd.grad(f(z := x.clone().requires_grad_()).sum(), z, create_graph=True),
    "grad": lambda f, x: grad(lambda x: f(x).sum())(x),
    "vmap of grad": lambda f, x: vmap(grad(lambda x: f(x).sum()))(x.expand(2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_missing_gradient_raises_and_names_the_argument(form):
    a = vector()
    wrong = define(forward=lambda a, /, x: a * x, backward=lambda ctx, g: (g, None))
    with pytest.raises(
        RuntimeError, match=r"Wrong.backward returned None as the gradient of argument 1 \(x\), which is"
    ):
        FORMS[form](lambda x: wrong.apply(a, x), a)


@pytest.mark.parametrize("level", ["jvp", "dual"])
def test_a_missing_tangent_raises(level):
    without = define(forward=lambda x: 2 * x, backward=lambda ctx, g: 2 * g)
    silent = define(forward=lambda x: 2 * x, backward=lambda ctx, g: 2 * g, jvp=lambda ctx, t: None)
    x = vector()

    def push(f):
        if level == "jvp":
            return jvp(f, (x,), (x,))
        with forward_ad.dual_level():
            return f(forward_ad.make_dual(x, x))

    with pytest.raises(NotImplementedError, match="implement the jvp"):
        push(without.apply)
    with pytest.raises(RuntimeError, match=r"Wrong.jvp returned None as the tangent of output 0"):
        push(silent.apply)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "vmap of grad"])  # under vmap torch unwraps what is saved
def test_a_saved_intermediate_raises(form):
    wrong = define(
        forward=lambda x: x**3,
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0] ** 2),
        backward=lambda ctx, g: 3 * g * ctx.saved_tensors[0],  # its second derivative would be zero
    )
    with pytest.raises(ValueError, match=r"Wrong.setup_context saved a tensor of shape \(3,\) that is neither"):
        FORMS[form](wrong.apply, vector())


@pytest.mark.parametrize("form", FORMS)
def test_tensors_in_containers_raise(form):
    wrong = define(forward=lambda x: [x, 2 * x], backward=lambda ctx, g, h: g + 2 * h)
    with pytest.raises(TypeError, match=r"Wrong.forward returned a list"):
        FORMS[form](lambda x: wrong.apply(x)[0], vector())
    scale = define(forward=lambda x, options: 2 * x, backward=lambda ctx, g: (2 * g, None))
    with pytest.raises(TypeError, match=r"argument 1 of Wrong.apply is a dict that holds a tensor"):
        FORMS[form](lambda x: scale.apply(x, {"k": [x]}), vector())
