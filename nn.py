"""Compressed embeddings without a store: each stands in for torch.nn.EmbeddingBag.

layer = embershard.nn.MEmCom(1_000_000, 64, hashed_rows=20_000)
vectors = layer(ids, offsets)
"""

from .workers.embeddings.layers import QR, DoubleHash, Full, Hash, MEmCom, QRPath
from .workers.embeddings.layers_mem_rec import MemRec, MemRecSample
from .workers.embeddings.layers_projected import MLET, Narrow

__all__ = ["MLET", "QR", "DoubleHash", "Full", "Hash", "MEmCom", "MemRec", "MemRecSample", "Narrow", "QRPath"]
