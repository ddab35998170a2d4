"""Every row of an epoch counts once, whatever the number of processes; what was divided is whole again."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch.utils.data import BatchSampler, SequentialSampler
from training_toys import Points, Toy, curve, in_two, run

from persona.training import shards
from persona.training.remainder import LeftOver


@pytest.mark.parametrize(("rows", "processes"), [(8, 2), (7, 2), (5, 2), (1, 2), (9, 4), (3, 4), (11, 3)])
def test_the_processes_batches_are_those_of_one_process_and_equally_many(rows: int, processes: int) -> None:
    batches = BatchSampler(SequentialSampler(range(rows)), batch_size=2, drop_last=False)
    shares = [LeftOver(batches, processes, rank) for rank in range(processes)]
    read = [list(share) for share in shares]
    assert {len(one) for one in read} == {len(shares[0])}
    counted = [one[:-1] if share.missing else one for one, share in zip(read, shares, strict=True)]
    assert sorted(row for one in counted for batch in one for row in batch) == list(range(rows))
    for step in range(len(shares[0])):  # a step has the rows that one process with the whole batch would have
        together = [row for one in counted for row in (one[step] if step < len(one) else [])]
        assert together == list(range(rows))[step * 2 * processes : (step + 1) * 2 * processes]


@pytest.mark.parametrize("rows", [1, 3, 5, 6])
def test_the_dev_loss_is_the_mean_over_all_rows_in_one_process_and_in_two(rows: int, tmp_path: Path) -> None:
    def module() -> Toy:
        made = Toy()
        made.dropout.p = 0.0
        return made

    steps = {"max_steps": 2, "eval_every": 1, "save_every": 5}
    after = run(tmp_path / "one", module(), dev=Points(rows), **steps)
    dev = Points(rows)
    with torch.no_grad():
        guess = after.head(after.frozen(dev.x)).squeeze(-1) + after.slow
    alone = curve(tmp_path / "one", "eval_loss")
    assert alone[2] == pytest.approx(float((guess - dev.y).square().mean()), rel=1e-6)
    assert in_two(lambda: run(tmp_path / "two", module(), dev=Points(rows), batch_size=2, **steps)) == [0, 0]
    assert curve(tmp_path / "two", "eval_loss") == pytest.approx(alone, rel=1e-6)
    # A step after an evaluation counts its labels as every other does; here it is an epoch's shorter last one.
    steps = {"max_steps": 3, "eval_every": 1, "save_every": 5}
    run(tmp_path / "one after", module(), Points(7), Points(rows), **steps)
    two = lambda: run(tmp_path / "two after", module(), Points(7), Points(rows), batch_size=2, **steps)  # noqa: E731
    assert in_two(two) == [0, 0]
    assert curve(tmp_path / "two after") == pytest.approx(curve(tmp_path / "one after"), rel=1e-6)


@pytest.fixture()
def one_process():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_a_model_that_fsdp_divided_is_what_it_was_and_can_be_divided_again(llama, one_process) -> None:
    from torch.distributed.fsdp import FSDPModule, fully_shard
    from torch.distributed.tensor import DTensor

    model = copy.deepcopy(llama.model)
    ids = torch.arange(6)[None]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        for _ in range(2):
            devices = shards.homes(model)
            for block in model.model.layers:
                fully_shard(block)
            fully_shard(model)
            model(input_ids=ids)
            assert all(isinstance(parameter, DTensor) for parameter in model.model.layers.parameters())
            shards.undo_fsdp2(model, devices)
            assert not any(isinstance(part, FSDPModule) for part in model.modules())
            assert not any(isinstance(parameter, DTensor) for parameter in model.parameters())
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
            assert torch.equal(model(input_ids=ids).logits, expected)
    assert tied == (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
