"""Fine-tunes a model with low-rank adapters (LoRA, arXiv:2106.09685) while its own weights stay as they are.

    train(model, Supervised(examples), Settings(epochs=2), out, base="smollm2")

The weights may be in any format: gradients flow through quantized weights, which are dequantized a part at a time
(QLoRA, arXiv:2305.14314). ``out`` becomes a folder with the adapter in the files of PEFT, a log, and the state from
which a stopped run continues.
"""

from __future__ import annotations

from moesaic.train.settings import Settings as Settings
from moesaic.train.trainer import Outcome as Outcome
from moesaic.train.trainer import train as train
