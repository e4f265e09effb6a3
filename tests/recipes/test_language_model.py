"""The GPT of torchcalc's parts is the GPT of torch's; what it says about a text is measured as it says."""

import math
import re

import pytest
import torch

from recipes.__main__ import main
from recipes.gpt import GPT
from recipes.language_model import rise_and_fall
from recipes.text import IGNORED, Text, Windows, packed
from tests.recipes.conftest import brief, curves, events
from tests.same import same

QUIET = "--trainer.enable_progress_bar=false"


def net(kind):
    torch.manual_seed(0)
    return GPT(50, 12, 16, 2, 2, kind)


def test_both_kinds_learn_the_same():
    ours, stock = net("torchcalc"), net("torch")
    same(ours.state_dict(), stock.state_dict())
    words = torch.randint(50, (3, 13))
    losses = {}
    for each in (ours, stock):
        optimizer = each.optimizer(1e-2, 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            loss = each(words[:, :-1], words[:, 1:])
            loss.backward()
            optimizer.step()
        losses[each] = loss.item()
    assert losses[ours] == pytest.approx(losses[stock], rel=1e-5)
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=lambda said, name=name: f"{name}: {said}")


def test_no_word_sees_what_follows():
    words = torch.randint(50, (1, 12))
    other = words.clone()
    other[0, 7:] += 1
    model = net("torchcalc")
    a, b = model(words % 50), model(other % 50)
    torch.testing.assert_close(a[:, :7], b[:, :7])
    assert not torch.equal(a[:, 7:], b[:, 7:])


def test_what_decays():
    model = net("torchcalc")
    names = {id(p): name for name, p in model.named_parameters()}
    decays, others = ({names[id(p)] for p in group["params"]} for group in model.optimizer(1e-3, 0.1).param_groups)
    assert decays | others == set(names.values()) and not decays & others
    assert {name for name in others if "norm" not in name} == {"positions.weight"}
    assert [group["weight_decay"] for group in model.optimizer(1e-3, 0.1).param_groups] == [0.1, 0.0]


def test_a_sample_leaves_the_generators_alone():
    model = net("torchcalc")
    state = torch.get_rng_state()
    text = model.generate(torch.arange(3), 20, 12)
    assert len(text) == 23 and torch.equal(text[:3], torch.arange(3))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("n", "context", "stride"), [(9, 8, 4), (100, 8, 4), (103, 8, 3), (50, 8, 8)])
def test_windows_count_every_target_once(n, context, stride):
    windows = Windows(torch.arange(n), context, stride, new=True)
    seen = []
    for i in range(len(windows)):
        words, target = windows[i]
        assert len(words) == len(target) == context
        counts = target != IGNORED
        assert torch.equal(words[counts] + 1, target[counts])
        seen += target[counts].tolist()
    assert seen == list(range(1, n))


def test_the_text_is_read_as_it_is(tmp_path):
    text = "".join(f"{i} héllo wörld\n" for i in range(6000))
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    data = Text(tmp_path / "text.txt", vocabulary=300)
    assert data.size == len(text.encode())
    assert sorted("".join(data.parts.values())) == sorted(text)
    for part, words in data.words.items():
        assert data.encoder.decode(words.tolist()) == data.parts[part]
    assert data.words_per_byte("test") == (len(data.words["test"]) - 1) / len(data.parts["test"].encode())
    alone, after = data.lzma_bits("test")
    assert alone == packed(data.parts["test"].encode()) / len(data.parts["test"].encode())
    assert after < alone


def test_the_learning_rate_rises_and_falls():
    rates = [rise_and_fall(step, 10, 100) for step in range(101)]
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[9] == rates[10] == max(rates) == 1 and rates[100] == pytest.approx(0.1)
    assert rise_and_fall(0, 0, 10) == 1


def test_the_report_and_the_curves(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    main([*brief("language_model"), QUIET])
    out, _ = capfd.readouterr()
    assert re.search(
        r"text: pydoc_data.topics, [\d,]+ bytes, sha256 [0-9a-f]{16}; 4,096 pieces, \d\.\d\d bytes each", out
    )
    ours, stock = (
        re.search(rf"  {kind} +(\d\.\d{{4}}) +\d+\.\d +(\d+\.\d) MB", out) for kind in ("torchcalc", "torch")
    )
    assert ours[1] == stock[1]
    assert float(ours[2]) < float(stock[2])
    bits = float(re.search(r"bits per byte of unseen text: (\d\.\d+); lzma \d\.\d+ alone", out)[1])
    run = tmp_path / "runs/language_model/version_0"
    found = curves(run)
    assert found["bits_per_byte/test"][-1][1] == pytest.approx(bits, abs=1e-3)
    ratio = found["bits_per_byte/val"][-1][1] / found["loss/val"][-1][1]
    assert ratio == pytest.approx(Text(context=16).words_per_byte("val") / math.log(2), rel=1e-5)
    assert "sample/text_summary" in events(run).Tags()["tensors"]
    torch.load(run / "checkpoints/best.ckpt", weights_only=True)


@pytest.mark.slow
@pytest.mark.filterwarnings(
    "ignore:Precision bf16-mixed is not supported by the model summary"
)  # Lightning's, of a size
def test_compiled_in_bfloat16(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    main([*brief("language_model"), "--trainer.precision=bf16-mixed", "--model.compile=true", QUIET])
    assert "bits per byte of unseen text" in capsys.readouterr().out
