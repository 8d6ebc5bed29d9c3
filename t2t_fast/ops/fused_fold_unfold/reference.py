"""Fold, normalise, unfold as FuseFormer computes it (``FusionFeedForward``): ``nn.Fold`` of tokens and of ones."""

import torch.nn.functional as F


def forward(tokens, size, kernel, stride, padding):
    """(B, L, C*kh*kw) -> (B, L, C*kh*kw): every pixel of every token becomes the mean over the tokens that show it."""
    window = {"kernel_size": kernel, "stride": stride, "padding": padding}
    ones = tokens.new_ones(1, 1, *size)
    count = F.fold(F.unfold(ones, **window), size, **window)
    image = F.fold(tokens.transpose(1, 2), size, **window) / count.clamp_min(1)  # pixels without a token are not read
    return F.unfold(image, **window).transpose(1, 2).contiguous()
