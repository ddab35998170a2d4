"""Steering: the direction by hand, nothing at coefficient 0, saved and loaded, undone afterwards."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch

import persona
from persona.data.base import People
from persona.errors import UserError
from persona.methods import steering
from persona.methods.steering import Steering, SteeringConfig, contrast, direction, steered_layers
from persona.personalizer import LanguageModel
from persona.training.trainer import TrainerConfig
from persona.types import Message, Persona, Request, Sample, Sampling

TRAITS = ("i like small boats and long walks .", "the lazy dog jumps over the red house !")
SAILOR = Persona("sailor", statements=TRAITS)
ASKED = [Request((Message("user", text),), sampling=Sampling(6)) for text in ("good morning", "the fox in the rain ?")]


def people(*personas: Persona) -> People:
    return People("x", {}, [Sample(p.id, (Message("user", "hi"),), persona=p) for p in personas], ())


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """Two coefficients of the same constitution."""
    out = tmp_path_factory.mktemp("steering")
    for coefficient in (0.0, 25.0):
        steering.train(
            SteeringConfig(coefficient=coefficient), LanguageModel(llama, batch_size=7), people(SAILOR, SAILOR),
            TrainerConfig(), out / str(coefficient),
        )  # fmt: skip
    return out


def test_direction_by_hand():
    # Differences (3, 0), (1, 0), (-1, 0), (0, 1): the common offset and each pair's middle do not count.
    told = np.array([[3.0, 0], [1, 0], [-1, 0], [0, 1]]) + 100
    untold = np.zeros((4, 2)) + 100
    found = direction(told, untold)
    assert found.vector == pytest.approx([1, 0], abs=1e-7) and found.explained == pytest.approx(11 / 12)
    assert found.agreed == 0.5  # two of four further along; one against; one neither
    turned = direction(untold, told)
    assert turned.vector == pytest.approx([-1, 0], abs=1e-7) and turned.agreed == 0.5


def test_the_majority_of_pairs_gives_the_sign_not_their_size():
    told = np.array([[-9.0, 0], [1, 0], [1, 0]])
    assert direction(told, np.zeros((3, 2))).vector == pytest.approx([1, 0], abs=1e-7)


def test_layers_are_the_published_middle():
    assert list(steered_layers(32)) == list(range(4, 28)) and list(steered_layers(2)) == [0]
    with pytest.raises(UserError, match="this one has 1 only"):
        steered_layers(1)


def test_pairs_are_the_same_beginnings_with_and_without_the_constitution(llama):
    told, untold = contrast(LanguageModel(llama), SAILOR, "english", [0, 1])
    lines = (steering.SHIPPED["english"] / "steering_beginnings.txt").read_text().splitlines()
    assert told.shape == untold.shape == (len(lines) + 1, 2, llama.hidden_size)
    question = Message("user", (steering.SHIPPED["english"] / "steering_question.md").read_text().strip())
    ids = torch.tensor([llama.render([question]) + llama.encode_option(lines[5])])
    with torch.no_grad():
        # A copy: transformers leaves hooks of its own in a model once it was asked for states.
        alone = copy.deepcopy(llama.model)(input_ids=ids, output_hidden_states=True).hidden_states[1][0, -1]
    assert untold[6, 0] == pytest.approx(alone.numpy(), abs=2e-4)  # the first pair has no beginning
    assert not np.allclose(told[0], untold[0])


def test_zero_is_the_base_bitwise_and_more_is_not(llama, trained):
    base = persona.load(llama).loglikelihood(ASKED, ["boats in the rain"] * 2)
    still = persona.load(llama, [trained / "0.0" / "personalizer"])
    assert still.loglikelihood(ASKED, ["boats in the rain"] * 2) == base
    moved = persona.load(llama, [trained / "25.0" / "personalizer"])
    assert all(a[0] != b[0] for a, b in zip(moved.loglikelihood(ASKED, ["boats in the rain"] * 2), base, strict=True))
    assert persona.load(llama).loglikelihood(ASKED, ["boats in the rain"] * 2) == base


def test_what_is_saved_is_what_was_found(llama, trained):
    loaded = persona.load(llama, [trained / "25.0" / "personalizer"]).personalizers[0]
    assert isinstance(loaded, Steering) and loaded.coefficient == 25 and loaded.layers == [0]
    told, untold = contrast(LanguageModel(llama, batch_size=64), SAILOR, "english", [0])
    expected = direction(told[:, 0], untold[:, 0])
    assert loaded.directions[0].numpy() == pytest.approx(expected.vector, abs=1e-3)  # batches of 7 and of 64
    table = json.loads((trained / "25.0" / "steering.json").read_text())
    assert table["pairs"] == len(told) and table["layers"][0]["layer"] == 0
    assert table["layers"][0]["agreed"] == pytest.approx(expected.agreed)


def test_one_by_one_is_the_batch(llama, trained):
    model = persona.load(llama, [trained / "25.0" / "personalizer"])
    together = model.respond(ASKED)
    assert [reply.tokens for reply in together] == [model.respond([one])[0].tokens for one in ASKED]


def test_mistakes_are_named(llama, tmp_path):
    def run(data: People, **settings):
        steering.train(SteeringConfig(**settings), LanguageModel(llama), data, TrainerConfig(), tmp_path)

    for data, settings, message in (
        (people(SAILOR, Persona("other", statements=("x",))), {}, "takes one constitution, but the data have 2"),
        (people(), {}, "but the data have 0 personas"),
        (people(Persona("bare")), {}, "bare has no traits"),
        (people(SAILOR), {"prompts": str(tmp_path)}, "constitution.md could not be read"),
    ):
        with pytest.raises(UserError, match=message):
            run(data, **settings)
    with pytest.raises(UserError, match="changes nothing"):
        direction(np.ones((3, 2)), np.ones((3, 2)))
