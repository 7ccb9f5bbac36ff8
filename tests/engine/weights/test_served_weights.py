"""Updates as transactions, without an engine: whole, in slices, encoded, partial, shared; checksums of both ends."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.engine.weights.aliased_weights import AliasedWeights
from lockstep.engine.weights.checksums import checksum
from lockstep.engine.weights.served_weights import OwnWeights

SHAPES = {"embedding.weight": (6, 4), "fc1.weight": (8, 4), "fc2.weight": (4, 8), "norm.weight": (4,)}
FORMATTED = ("fc1.weight", "fc2.weight")


def encoder(name):
    """An int8 format: a row's values as multiples of its scale."""

    def encode(whole):
        if whole.dim() != 2:
            raise ValueError("a matrix is wanted")
        scale = whole.abs().amax(1, keepdim=True).clamp(min=1e-6).float() / 127
        return {name: (whole / scale).round().to(torch.int8), f"{name}_scale": scale}

    return encode


ENCODERS = {name: encoder(name) for name in FORMATTED}
WHOLES = {name: torch.empty(SHAPES[name], device="meta") for name in FORMATTED}


def values(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def parts_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    parts = {}
    for name, tensor in tensors.items():
        parts |= ENCODERS[name](tensor) if name in ENCODERS else {name: tensor}
    return parts


def copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def plain() -> OwnWeights:
    return OwnWeights(values(1))


def encoded() -> OwnWeights:
    return OwnWeights(parts_of(values(1)), ENCODERS, WHOLES)


def serves(weights: OwnWeights, parts: dict[str, torch.Tensor]) -> bool:
    assert weights.targets.keys() == parts.keys()
    return all(torch.equal(weights.targets[name], tensor) for name, tensor in parts.items())


def update(weights: OwnWeights, tensors, version: int = 1, partial: bool = False) -> dict:
    return weights.flip(weights.stage(tensors.items(), partial), version)()


def test_plain_weights_are_received_as_they_are_served():
    weights, new = plain(), values(2)
    addresses = {name: tensor.data_ptr() for name, tensor in weights.targets.items()}
    report = update(weights, new)
    assert serves(weights, new)
    assert {name: tensor.data_ptr() for name, tensor in weights.targets.items()} == addresses
    assert weights.version == 1
    assert report["checksum"] == report["received_checksum"] == weights.checksum() == checksum(new.items())
    assert report["received"] == report["served"]
    assert report["served"].keys() == new.keys()


def test_wholes_are_encoded_on_arrival_and_both_ends_have_a_checksum():
    weights, new = encoded(), values(2)
    report = update(weights, new)
    assert serves(weights, parts_of(new))
    assert report["received_checksum"] == checksum(new.items())
    assert report["checksum"] == weights.checksum() == checksum(parts_of(new).items())
    assert report["received"].keys() == new.keys()
    assert report["served"].keys() == parts_of(new).keys()
    untouched = {"embedding.weight", "norm.weight"}
    assert {name for name in new if report["received"][name] == report["served"][name]} == untouched


@settings(deadline=None, max_examples=60)
@given(st.sets(st.sampled_from(sorted(SHAPES)), min_size=1), st.sets(st.sampled_from(FORMATTED)), st.booleans())
def test_any_mix_of_wholes_and_parts_and_any_selection(names, sent_encoded, in_room):
    """What is sent is served; what is not stays."""
    weights, old, new = encoded(), values(1), values(2)
    sent = {name: new[name] for name in names if name not in sent_encoded}
    sent |= parts_of({name: new[name] for name in names & sent_encoded})
    partial = names != set(SHAPES)
    if in_room and names.isdisjoint(sent_encoded):
        arriving = weights.room(1, partial)
        for name, tensor in sent.items():
            arriving.tensors[name].copy_(tensor)
            arriving.received(name, tensor.numel())
        weights.check_arrived(arriving)
        report = weights.flip(weights.stage(arriving.arrived(), partial), 1)()
    else:
        report = update(weights, sent, partial=partial)
    assert serves(weights, parts_of({**old, **{name: new[name] for name in names}}))
    assert report["received"].keys() == sent.keys()
    assert report["checksum"] == weights.checksum()


MATRIX = values(2)["fc1.weight"]
REFUSED = {
    "missing": (lambda w: w.pop("norm.weight"), False, "lacks 1 tensors, the first is 'norm.weight'"),
    "missing whole": (lambda w: w.pop("fc1.weight"), False, "lacks 2 tensors, the first is 'fc1.weight'"),
    "half a whole": (lambda w: w.update(encoder("fc1.weight")(MATRIX), **{"fc1.weight_scale": None}), True, "lacks 1"),
    "unknown": (lambda w: w.update({"fc3.weight": MATRIX}), True, "unknown tensor 'fc3.weight'"),
    "part and whole": (lambda w: w.update({"fc1.weight_scale": MATRIX[:, :1]}), True, "'fc1.weight_scale' twice"),
    "shape": (lambda w: w.update({"norm.weight": MATRIX}), True, r"'norm.weight' has shape \(8, 4\), expected \(4,\)"),
    "dtype": (lambda w: w.update({"norm.weight": w["norm.weight"].double()}), True, "'norm.weight' has dtype .*64"),
    "whole's shape": (lambda w: w.update({"fc1.weight": MATRIX[:5]}), True, r"'fc1.weight' has shape \(5, 4\)"),
    "whole's dtype": (lambda w: w.update({"fc1.weight": MATRIX.double()}), True, "'fc1.weight' has dtype .*64, expec"),
    "nothing": (lambda w: w.clear(), True, "holds no tensor"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_refused_update_names_the_tensor_and_changes_nothing(case):
    breaks, partial, message = REFUSED[case]
    weights, new = encoded(), values(2)
    breaks(new)
    sent = {name: tensor for name, tensor in new.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        update(weights, sent, partial=partial)
    assert serves(weights, parts_of(values(1)))
    assert weights.version == 0


def test_what_an_encoder_cannot_take_is_named():
    weights = OwnWeights(parts_of(values(1)), ENCODERS)  # nobody says what the wholes are like
    with pytest.raises(ValueError, match=r"'fc1.weight'.*a matrix is wanted"):
        update(weights, {**values(2), "fc1.weight": MATRIX[0]})
    with pytest.raises(ValueError, match=r"'fc1.weight' has shape \(5, 4\)"):
        update(weights, {**values(2), "fc1.weight": MATRIX[:5]})
    assert serves(weights, parts_of(values(1)))


def test_an_encoder_that_makes_other_parts_than_are_served_is_named():
    weights = OwnWeights(parts_of(values(1)), {**ENCODERS, "fc1.weight": lambda whole: {"fc1.weight": whole}})
    with pytest.raises(ValueError, match=r"'fc1.weight': its encoder makes \['fc1.weight'\]"):
        update(weights, values(2))


def test_a_format_whose_part_looks_like_the_whole_encodes_it():
    """Values that are rounded in place, say: nothing in the tensor tells whether that was done."""
    parts = {name: tensor.round() for name, tensor in values(1).items()}
    weights = OwnWeights(parts, {"fc1.weight": lambda whole: {"fc1.weight": whole.round()}}, WHOLES)
    new = values(2)
    report = update(weights, new)
    assert serves(weights, {**new, "fc1.weight": new["fc1.weight"].round()})
    assert (report["received_checksum"], report["checksum"]) == (checksum(new.items()), weights.checksum())


def test_a_whole_that_its_encoder_writes_to_is_hashed_as_it_came():
    def encode(whole):
        parts = encoder("fc1.weight")(whole)
        whole.zero_()
        return parts

    weights, new = OwnWeights(parts_of(values(1)), {**ENCODERS, "fc1.weight": encode}), values(2)
    assert update(weights, copied(new))["received_checksum"] == checksum(new.items())


def test_parts_may_arrive_in_slices_encoded_or_whole():
    for is_encoded in (False, True):
        weights, new = encoded(), values(2)
        sent = parts_of(new) if is_encoded else new
        arriving = weights.room(1, encoded=is_encoded)
        assert {name: (t.shape, t.dtype) for name, t in arriving.tensors.items()} == {
            name: (t.shape, t.dtype) for name, t in sent.items()
        }
        for name, tensor in sent.items():
            for half in tensor.chunk(2):
                with pytest.raises(ValueError, match="is incomplete"):
                    weights.check_arrived(arriving)
                first = (half.data_ptr() - tensor.data_ptr()) // tensor.itemsize // tensor[0].numel()
                arriving.tensors[name][first : first + len(half)] = half
                arriving.received(name, half.numel())
        weights.check_arrived(arriving)
        weights.flip(weights.stage(arriving.arrived()), 1)()
        assert serves(weights, parts_of(new))


def test_of_a_partial_update_what_has_begun_must_end():
    weights, new = plain(), values(2)
    arriving = weights.room(1, partial=True)
    arriving.tensors["fc1.weight"].copy_(new["fc1.weight"])
    arriving.received("fc1.weight", 12)
    with pytest.raises(ValueError, match=r"20 elements of fc1.weight are missing, and 0 other"):
        weights.check_arrived(arriving)
    with pytest.raises(ValueError, match=r"unknown tensor 'fc3.weight'"):
        arriving.received("fc3.weight", 1)
    arriving.received("fc1.weight", 20)
    weights.flip(weights.stage(arriving.arrived(), partial=True), 1)()
    assert serves(weights, {**values(1), "fc1.weight": new["fc1.weight"]})


def test_an_update_whose_room_was_given_away_is_refused():
    weights = plain()
    first, second = weights.room(1), weights.room(2)
    for name, tensor in values(2).items():
        for arriving in (first, second):
            arriving.tensors[name].copy_(tensor)
            arriving.received(name, tensor.numel())
    with pytest.raises(ValueError, match="weight update 1 was given up: update 2 was begun after it"):
        weights.check_arrived(first)
    weights.check_arrived(second)


def test_the_room_is_kept_until_it_is_freed():
    weights = plain()
    addresses = [weights.room(version).tensors["fc1.weight"].data_ptr() for version in (1, 2)]
    assert addresses[0] == addresses[1]
    kept = weights.room(3).tensors["fc1.weight"]
    weights.free_room()
    assert weights.room(4).tensors["fc1.weight"].data_ptr() != kept.data_ptr()


def test_shared_weights_change_by_their_owners_word():
    targets, owned, changes = values(1), values(2), [0]
    weights = AliasedWeights(owned.items(), targets, lambda: changes[0])
    assert torch.equal(targets["norm.weight"], values(1)["norm.weight"]), "nothing has changed yet"
    weights.begin(1)
    assert {name: t.data_ptr() for name, t in targets.items()} == {name: t.data_ptr() for name, t in owned.items()}
    weights.check_current()
    changes[0] += 1
    with pytest.raises(RuntimeError, match="changed since version 1 was published"):
        weights.check_current()
    assert update(weights, owned, version=2)["checksum"] == ""
    weights.check_current()
    assert (weights.version, weights.checksum()) == (2, checksum(owned.items()))
    update(weights, {"norm.weight": owned["norm.weight"]}, version=3, partial=True)
    for call in (lambda: update(weights, copied(owned)), lambda: update(weights, values(2)), lambda: weights.room(4)):
        with pytest.raises(ValueError, match="it takes no others"):
            call()
    with pytest.raises(ValueError, match="it takes no others"):
        update(weights, {"norm.weight": owned["norm.weight"]})


@pytest.mark.parametrize("fault", ["strides", "missing"])
def test_tensors_that_cannot_be_shared_change_nothing(fault):
    targets, owned = values(1), values(2)
    if fault == "strides":
        owned["fc2.weight"] = owned["fc2.weight"].t().contiguous().t()
    else:
        del owned["fc2.weight"]
    with pytest.raises(ValueError, match=r"fc2.weight"):
        AliasedWeights(owned.items(), targets, lambda: 0)
    assert torch.equal(targets["norm.weight"], values(1)["norm.weight"])
