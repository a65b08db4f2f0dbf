"""verify can fail; compare puts recipes side by side."""

import json

import pytest
import torch

from efftune import EfftuneError
from efftune.train.compare import compare
from efftune.train.verify import fidelity, judge, verify
from tests.train.test_run import sentence


def test_fidelity_of_known_errors():
    torch.manual_seed(0)
    exact, batches = torch.randn(200).double(), torch.randn(8, 200).double()
    noise = torch.randn(64, 200).double()
    fair = fidelity("w", 0.3 * noise, exact, batches, 100)
    assert (
        abs(fair.z) < 4
        and fair.error == pytest.approx(0.3, rel=0.2)
        and fair.variance_to_sgd == pytest.approx(0.09, rel=0.3)
    )
    assert fair.variance_per_byte == pytest.approx(fair.error**2 / 100)
    biased = fidelity("w", 0.3 * noise + 0.1 * exact, exact, batches, 0)
    assert biased.z > 6 and biased.bias == pytest.approx(0.1, rel=0.3) and biased.variance_per_byte is None
    judge([fair], 0.02)
    with pytest.raises(EfftuneError, match=r"1 of 2 gradients are biased; the most that of w: \d+\.\d% of its norm"):
        judge([fair, biased], 0.02)
    with pytest.raises(EfftuneError, match="NaN or Inf"):
        judge([fidelity("w", noise * torch.nan, exact, batches, 0)], 0.02)


def test_fair_noise_is_seldom_called_biased():
    generator = torch.Generator().manual_seed(1)
    z = []
    for _ in range(200):
        errors = torch.randn(16, 50, generator=generator).double()
        errors[:, 1:] *= 0.01  # nearly all of it in one direction: a quadratic form would have a heavy tail
        z.append(fidelity("w", errors, torch.ones(50).double(), torch.randn(4, 50).double(), 0).z)
    assert sum(v > 2.33 for v in z) <= 7 and abs(sum(z) / len(z)) < 0.3  # 1 % of 200, and 3.5 standard deviations


@pytest.fixture
def job(model_folder, write):
    rows = [{"question": sentence(i), "answer": sentence(i + 99)} for i in range(30)]
    return dict(model=str(model_folder), data=str(write("qa.jsonl", rows)), batch_size=4, seq_len=64, lr=1e-3)


@pytest.mark.parametrize("recipe", ["full + wtacrs(ratio=0.5)", "lora(r=4) + wtacrs(ratio=0.5) + mesa(bits=8)"])
def test_verify_passes_what_is_unbiased(job, recipe, tmp_path, capsys):
    results = verify({**job, "recipe": recipe, "out": str(tmp_path)}, seeds=12, batches=3, max_bias=0.05)
    assert any(r.error > 0.001 for r in results)
    assert "has a bias that is both significant" in capsys.readouterr().out
    saved = json.loads((tmp_path / "verify.json").read_text())
    assert len(saved["parameters"]) == len(results) and saved["seeds"] == 12


def test_verify_fails_on_what_is_biased(job):
    with pytest.raises(EfftuneError, match="gradients are biased"):
        verify({**job, "recipe": "full + wtacrs(ratio=0.3, sampler='topk', biased=True)"}, seeds=6, batches=3)


def test_compare(job, tmp_path, capsys):
    settings = {**job, "steps": 3, "out": str(tmp_path / "c"), "eval_fraction": 0.2, "sample_tokens": 0}
    rows = compare(["full", "full + mesa(bits=4)", "mezo"], settings)
    assert rows[1]["saved"] < 0.5 * rows[0]["saved"] and rows[2]["saved"] == 0
    assert all(row["eval_loss"] > 0 and row["tokens_per_s"] > 0 and row["peak"] > 0 for row in rows)
    out = tmp_path / "c"
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"
    assert "| `full + mesa(bits=4)` |" in (out / "compare.md").read_text()
    assert len(json.loads((out / "compare.json").read_text())) == 3
    assert (out / "1-full-mesa-bits-4" / "report.html").exists()
    with pytest.raises(EfftuneError, match="two different recipes"):
        compare(["full"], settings)
    with pytest.raises(EfftuneError, match="no method 'nonsense'"):
        compare(["full", "nonsense"], {**settings, "out": str(tmp_path / "d")})
    assert not (tmp_path / "d").exists()


def test_verify_refuses_what_has_no_gradients(job):
    with pytest.raises(EfftuneError, match="'full . mezo' leaves no gradients to look at"):
        verify({**job, "recipe": "mezo"}, seeds=4, batches=2)
