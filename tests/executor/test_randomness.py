"""Seeds depend on what is computed, not on when."""

import torch

from executor.randomness import op_seed, seeder


def test_a_seed_is_a_function_of_its_five_numbers() -> None:
    seeds = {
        op_seed(seed, step, micro_batch, op, evaluation=evaluation)
        for seed in (0, 1, 2**63 - 1)
        for step in (1, 2)
        for micro_batch in (0, 1)
        for op in (0, 1, 7)
        for evaluation in (False, True)
    }
    assert len(seeds) == 3 * 2 * 2 * 3 * 2
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert op_seed(1, 2, 3, 4) == op_seed(1, 2, 3, 4)


def test_the_value_of_a_seed_is_part_of_the_exactness_contract() -> None:
    assert op_seed(0, 1, 0, 5) == 8361400047082659051


def test_seeding_is_what_manual_seed_does_on_that_device() -> None:
    torch.manual_seed(1234)
    expected = torch.rand(3)
    torch.rand(5)
    seeder(torch.device("cpu"))(1234)
    assert torch.equal(torch.rand(3), expected)
