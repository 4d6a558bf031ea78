"""The one rule for how far a result may be from the truth.

The truth is float64. Eager PyTorch in the working dtype shows what that dtype costs on the same inputs, so our largest
error may be twice eager's, plus two eps of the result's dtype at the size of the truth: eager may round exactly where
we do not.

Eager's largest error is an estimate only if enough elements went into it. Over a few (a 0-d loss, a number per row) it
is luck: 0 in one run, many roundings in the next. A result of fewer than 100 elements therefore gets eager's usual
error in place of the measured one: an eps in fp32 and fp64, half an eps in 16 bits, where only the store rounds.

One more allowance is measured, never guessed: every implementation rounds log-probs to fp32, and a ratio
exp(logprob - old_logprob) passes that rounding on. `rounded` is the truth with that intermediate off by half an ulp.
"""

import torch

ENOUGH = 100  # elements, for eager's largest error to be an estimate


def assert_near(ours, eager, truth, what="", rounded=None, enough=ENOUGH):
    """Asserts max |ours - truth| <= 2 max |eager - truth| + 2 eps max |truth| + max |rounded - truth|.

    Below `enough` elements eager's usual error replaces the measured one. A truth below 1e-3 counts as 1e-3.
    A smaller `enough` is right only where eager's error is systematic, such as that of a sum of a million terms.
    """
    assert ours.shape == truth.shape, f"{what}: shape {ours.shape}, truth {truth.shape}"
    if not truth.numel():
        return
    truth, eager = truth.detach().double().cpu(), eager.detach().double().cpu()
    assert not torch.isnan(ours).any(), f"{what}: NaN"
    error = float((ours.detach().double().cpu() - truth).abs().max())
    eps = torch.finfo(ours.dtype).eps * max(1e-3, float(truth.abs().max()))
    usual = eps if ours.dtype in (torch.float32, torch.float64) else eps / 2
    of_eager = float((eager - truth).abs().max()) if truth.numel() >= enough else usual
    moved = 0.0 if rounded is None else float((rounded.detach().double().cpu() - truth).abs().max())
    assert error <= 2 * of_eager + 2 * eps + moved, (
        f"{what}: error {error:.3g}, eager {of_eager:.3g}, eps {eps:.3g}, rounded {moved:.3g}"
    )


def off_by_rounded_log_probs(truth, logprob, moved):
    """The results `truth`, each entry off by as far as fp32's rounding of the rows' log-probs may move it.

    `moved(move)` are the results with `move` added to the fp64 log-probs, wherever the loss reads them. Each row moves
    alone, by half an ulp (2^-24 of it), and the distances add up: in a sum over rows all roundings may have one sign.
    """
    off = [t.clone() for t in truth]
    for row in torch.diag(2.0**-24 * logprob.flatten()):
        for sums, now, t in zip(off, moved(row.view_as(logprob)), truth, strict=True):
            sums += (now - t).abs()
    return off
