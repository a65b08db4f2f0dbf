import pytest
import torch
from torch import nn

import efftune
from efftune.optim import seed_log
from efftune.optim.seed_log import SeedLog, fingerprint
from efftune.optim.zeroth_order import ZerothOrderSGD
from tests.methods.models import llama


def test_a_log_is_small_may_be_cut_and_knows_what_it_is(tmp_path):
    log = SeedLog()
    for step in range(10_000):
        log.append(step, 1000 + step, torch.tensor(step / 7), 0, [])
    path = tmp_path / "log"
    log.save(path, {"recipe": "mezo"})
    assert path.stat().st_size <= 170_000
    again, _ = SeedLog.load(path)
    assert again.entries.tobytes() == log.entries.tobytes()
    data = path.read_bytes()
    for changed in (data[:-6] + bytes([data[-6] ^ 1]) + data[-5:], data.replace(b"mezo", b"mazo")):
        path.write_bytes(changed)
        with pytest.raises(efftune.EfftuneError, match="damaged: it is not what was written"):
            SeedLog.load(path)
    path.write_bytes(data[:-1000])
    cut, about = SeedLog.load(path)
    assert len(cut.entries) == 10_000 - 63 and about["count"] == 10_000
    assert cut.entries.tobytes() == log.entries[: len(cut.entries)].tobytes()
    for broken in (b"", data[:50], b"{}" * 40, data.replace(b"efftune-seed-log-2", b"efftune-seed-log-9")):
        path.write_bytes(broken)
        with pytest.raises(efftune.EfftuneError, match="no seed log"):
            SeedLog.load(path)
    with pytest.raises(efftune.EfftuneError, match="cannot be read"):
        SeedLog.load(tmp_path / "nowhere")


def test_a_fingerprint_sees_every_change():
    model = llama(dtype=torch.bfloat16)
    first = fingerprint(model)
    assert first == fingerprint(llama(dtype=torch.bfloat16)) != fingerprint(llama(dtype=torch.float32))
    weight = model.model.layers[1].mlp.up_proj.weight.data
    weight[[3, 4]] = weight[[4, 3]]
    swapped = fingerprint(model)
    weight[[3, 4]] = weight[[4, 3]]
    assert swapped != first == fingerprint(model)


def test_a_log_ends_where_an_entry_cannot_name_its_part(monkeypatch):
    """As of a router that leaves out other experts in each step."""
    monkeypatch.setattr(seed_log, "PARTS", 3)
    names = ["a", "b", "c", "d"]
    params = [(name, nn.Parameter(torch.ones(2))) for name in names]
    optimizer = ZerothOrderSGD(params, lr=0.1)
    for step, unused in enumerate("abacabd"):
        optimizer.scalars.accumulate(step, 1.0, {id(p) for name, p in params if name != unused})
        optimizer.step()
        assert optimizer.log.ended == (step == 6)
    assert optimizer.log.count == 6 and [part["unused"] for part in optimizer.log.parts] == [["a"], ["b"], ["c"]]
    state = optimizer.state_dict()
    assert state["zeroth_order"]["log"] is None
    again = ZerothOrderSGD(params, lr=0.1)
    again.load_state_dict(state)
    again.scalars.accumulate(9, 1.0, {id(params[0][1])})
    again.step()
    assert again.log.ended and again.state_dict()["zeroth_order"]["log"] is None
    with pytest.raises(efftune.EfftuneError, match="go on from the seed log, and the run's had come to its end"):
        ZerothOrderSGD(params, momentum=0.9).load_state_dict(state)


def test_a_damaged_log_is_one_sentence(tmp_path):
    log, path = SeedLog(), tmp_path / "log"
    log.append(0, 7, torch.tensor(1.0), 0, [])
    log.save(path, {"recipe": "mezo"})
    data = path.read_bytes()
    path.write_bytes(data[:-16])
    with pytest.raises(efftune.EfftuneError, match="cut before its first entry"):
        SeedLog.load(path)
    log.parts = []
    log.save(path, {})
    with pytest.raises(efftune.EfftuneError, match="no seed log"):
        SeedLog.load(path)
    log.parts = [{"group": 3, "unused": []}]
    with pytest.raises(efftune.EfftuneError, match="4 groups"):
        ZerothOrderSGD([("w", nn.Parameter(torch.zeros(2)))]).replay(log)
