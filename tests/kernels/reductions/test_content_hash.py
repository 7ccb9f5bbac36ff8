import pytest
import torch

from lockstep.kernels.reductions import content_hash as content_hash_module
from lockstep.kernels.reductions.content_hash import (
    Placement,
    _block_sums_triton,
    _together,
    _together_triton,
    _words,
    content_hash,
    content_hash_reference,
    content_hashes,
    copy_and_hash,
    copy_and_verify,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_bytes(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096, 65536, 65537, 300_000])
def test_equals_the_formula(count):
    data = random_bytes(count)
    expected = content_hash_reference(data)
    assert int(content_hash(data)) == expected
    assert int(_block_sums_triton(_words(data.to(DEVICE))).sum()) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int64])
def test_is_of_the_bytes_in_index_order(dtype):
    matrix = random_bytes(96 * 64 * dtype.itemsize).view(dtype).view(96, 64)
    assert content_hash(matrix) == content_hash(matrix.clone())
    assert content_hash(matrix.t()) == content_hash(matrix.t().contiguous()) != content_hash(matrix)
    assert content_hash(matrix[1:]) == content_hash(matrix[1:].clone())


def test_any_changed_or_moved_bit_changes_it():
    data = random_bytes(2000)
    whole = content_hash(data)
    for byte in range(0, 2000, 13):
        changed = data.clone()
        changed[byte] ^= 1 << byte % 8
        assert content_hash(changed) != whole
    words = data.view(torch.int64)
    assert content_hash(words.flip(0)) != whole
    assert content_hash(torch.zeros(16)) != content_hash(torch.zeros(18))
    assert int(content_hash(torch.empty(0))) == 0


def _tensors(device="cpu"):
    """Whole words and not, aligned and not, empty, strided."""
    data = random_bytes(50_000).to(device)
    matrix = data[:4096].view(torch.float32).view(32, 32)
    return [
        data[:40_000],
        data[8:24],
        data[:7],
        data[3:19],
        data[:0],
        matrix.t(),
        matrix[:, :16],
        data[:4096].view(64, 64),
    ]


@pytest.mark.parametrize("together", [content_hashes, lambda tensors: _together_triton(tensors, tensors, "hash")[0]])
def test_together_is_each_alone(together):
    tensors = _tensors(DEVICE)
    assert together(tensors).tolist() == [content_hash_reference(tensor) for tensor in tensors]
    assert content_hashes([]).tolist() == []


@pytest.mark.parametrize("together", [_together, _together_triton])
@pytest.mark.parametrize("mode", ["copy", "verify"])
def test_copies_and_tells_what_it_read_and_what_is_there(together, mode):
    sources = _tensors(DEVICE)
    targets = [torch.zeros_like(source, memory_format=torch.contiguous_format) for source in sources]
    read, written = together(sources, targets, mode)
    for source, target in zip(sources, targets, strict=True):
        assert torch.equal(source.contiguous().view(torch.uint8), target.view(torch.uint8))  # bytes: some are NaN
    assert read.tolist() == content_hashes(targets).tolist() == [content_hash_reference(s) for s in sources]
    if mode == "verify":
        assert written.tolist() == read.tolist()


def test_what_is_read_back_is_what_is_there(monkeypatch):
    monkeypatch.setattr(content_hash_module, "_copy_each", lambda sources, targets: None)
    source, target = torch.ones(9), torch.zeros(9)
    read, written = copy_and_verify([source], [target])
    assert (read.item(), written.item()) == (content_hash_reference(source), content_hash_reference(target))


def test_copies_are_refused_that_do_not_fit():
    with pytest.raises(ValueError, match=r"shape \(3,\) and torch.float32"):
        copy_and_hash([torch.zeros(3)], [torch.zeros(4)])
    data = torch.zeros(64, dtype=torch.int64)
    with pytest.raises(ValueError, match="overlap"):
        _together_triton([data[:16], data[16:32]], [data[32:48], data[46:62]], "copy")


def placed_parts(matrix: torch.Tensor, row: int, column: int) -> list[tuple[torch.Tensor, Placement]]:
    """The matrix cut in four at (row, column), and where the parts lie in it."""
    stride = matrix.shape[1] * matrix.itemsize
    parts = []
    for top, bottom in ((0, row), (row, matrix.shape[0])):
        for left, right in ((0, column), (column, matrix.shape[1])):
            width = (right - left) * matrix.itemsize
            parts.append(
                (matrix[top:bottom, left:right], Placement(top * stride + left * matrix.itemsize, width, stride))
            )
    return parts


@pytest.mark.parametrize("cut", [(1, 4), (150, 8), (37, 100)])
def test_shares_of_parts_add_up_to_the_hash(cut):
    matrix = random_bytes(300 * 116 * 2).view(torch.bfloat16).view(300, 116)
    parts = placed_parts(matrix, *cut)
    shares = [content_hash(part, place) for part, place in parts]
    assert sum(shares) == content_hash(matrix)
    assert [_block_sums_triton(_words(part.to(DEVICE)), place).sum() for part, place in parts] == shares
    swapped = content_hash(parts[0][0], parts[1][1]._replace(width=parts[0][1].width))
    assert sum(shares) - shares[0] + swapped != content_hash(matrix)


def test_a_part_that_cuts_a_word_is_refused():
    with pytest.raises(ValueError, match="whole words"):
        content_hash(torch.zeros(4, 3), Placement(0, 12, 20))
