"""Do samples follow a distribution? Pearson's test, for the tests of the sampler."""

from __future__ import annotations

import torch

MIN_EXPECTED = 5
"""Below this many expected samples the statistic is not chi-square: such tokens count as one."""


def assert_follows(counts: torch.Tensor, probability: torch.Tensor) -> None:
    """Fail when samples would look like this in fewer than 1 of 10,000 runs.

    Args:
        counts: [vocab_size], samples of each token.
        probability: [vocab_size], as it should be; where it is 0, no sample is forgiven.
    """
    expected = probability.double() * counts.sum()
    assert counts[expected == 0].sum() == 0, "a token without probability was sampled"
    common = expected >= MIN_EXPECTED
    rare = (expected > 0) & ~common
    groups = [(counts[common], expected[common])]
    if rare.any():
        groups.append((counts[rare].sum()[None], expected[rare].sum()[None]))
    observed = torch.cat([group[0] for group in groups]).double()
    wanted = torch.cat([group[1] for group in groups])
    if len(wanted) == 1:
        assert observed.sum() == counts.sum()
        return
    statistic = ((observed - wanted).square() / wanted).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.float64)
    assert torch.special.gammaincc(freedom, statistic / 2) > 1e-4
