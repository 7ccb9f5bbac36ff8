import pytest
import torch

from lockstep.kernels.memory.step_inputs import _step_inputs_triton, step_inputs

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def brute_force(tokens, requests, positions, last_tokens, page_table, page_size):
    token_ids, slots = [], []
    for token, request, position in zip(tokens.tolist(), requests.tolist(), positions.tolist(), strict=True):
        if request < 0:
            token_ids.append(0)
            slots.append(-1)
            continue
        token_ids.append(max(token if token >= 0 else int(last_tokens[request]), 0))
        slots.append(int(page_table[request, position // page_size]) * page_size + position % page_size)
    return torch.tensor(token_ids), torch.tensor(slots)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("op", [step_inputs, _step_inputs_triton])
def test_equals_the_loop(op, page_size):
    generator = torch.Generator().manual_seed(page_size)
    num_rows, num_requests, max_pages = 300, 7, 5
    requests = torch.randint(-1, num_requests, (num_rows,), generator=generator)
    tokens = torch.randint(-1, 1000, (num_rows,), generator=generator)
    positions = torch.randint(0, max_pages * page_size, (num_rows,), generator=generator)
    last_tokens = torch.randint(-1, 1000, (num_requests,), generator=generator)
    page_table = torch.randint(0, 99, (num_requests, max_pages), generator=generator).to(torch.int32)
    inputs = (tokens, requests, positions, last_tokens, page_table)
    results = op(*(tensor.to(DEVICE) for tensor in inputs), page_size)
    for result, expected in zip(results, brute_force(*inputs, page_size), strict=True):
        assert torch.equal(result.cpu(), expected)
