"""Upstream-shaped eager tokens-to-token module: three soft splits with two attention layers between them.

Source: ``T2T_module`` in ``models/t2t_vit.py`` of yitu-opensource/T2T-ViT (figure 3 of the T2T-ViT paper).
"""

from math import isqrt

from torch import nn

from .token_performer import Token_performer
from .token_transformer import Token_transformer


class T2T_module(nn.Module):
    """(B, in_chans, H, W) image -> (B, H/16 * W/16, embed_dim) tokens; square images only, as upstream.

    Args:
        img_size: side of the square image; a multiple of 16.
        tokens_type: "performer", "transformer" or "convolution" (three convolutions in a row, which upstream sets up
            for the paper's comparison but gives no forward).
        in_chans, embed_dim, token_dim: channels of the image, width of the outgoing and of the inner tokens.
    """

    def __init__(self, img_size=224, tokens_type="performer", in_chans=3, embed_dim=768, token_dim=64):
        super().__init__()
        self.tokens_type = tokens_type
        if tokens_type == "convolution":
            self.soft_split0 = nn.Conv2d(3, token_dim, kernel_size=(7, 7), stride=(4, 4), padding=(2, 2))
            self.soft_split1 = nn.Conv2d(token_dim, token_dim, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
            self.project = nn.Conv2d(token_dim, embed_dim, kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
        elif tokens_type in ("performer", "transformer"):
            self.soft_split0 = nn.Unfold(kernel_size=(7, 7), stride=(4, 4), padding=(2, 2))
            self.soft_split1 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
            self.soft_split2 = nn.Unfold(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1))
            if tokens_type == "performer":
                self.attention1 = Token_performer(dim=in_chans * 7 * 7, in_dim=token_dim, kernel_ratio=0.5)
                self.attention2 = Token_performer(dim=token_dim * 3 * 3, in_dim=token_dim, kernel_ratio=0.5)
            else:
                self.attention1 = Token_transformer(dim=in_chans * 7 * 7, in_dim=token_dim, num_heads=1, mlp_ratio=1.0)
                self.attention2 = Token_transformer(dim=token_dim * 3 * 3, in_dim=token_dim, num_heads=1, mlp_ratio=1.0)
            self.project = nn.Linear(token_dim * 3 * 3, embed_dim)
        else:
            raise ValueError(
                f"T2T_module: tokens_type must be performer, transformer or convolution, got {tokens_type!r}"
            )
        self.num_patches = (img_size // 16) ** 2

    @staticmethod
    def restructurize(x):
        """Tokens (B, L, C) back to a square image (B, C, sqrt(L), sqrt(L))."""
        batch, length, channels = x.shape
        side = isqrt(length)
        return x.transpose(1, 2).reshape(batch, channels, side, side)

    def forward(self, x):
        if self.tokens_type == "convolution":
            return self.project(self.soft_split1(self.soft_split0(x))).flatten(2).transpose(1, 2)
        x = self.attention1(self.soft_split0(x).transpose(1, 2))
        x = self.attention2(self.soft_split1(self.restructurize(x)).transpose(1, 2))
        return self.project(self.soft_split2(self.restructurize(x)).transpose(1, 2))
