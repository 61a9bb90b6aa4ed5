"""What the loop can train."""

from deltacache.models.deltatok import DeltaTok
from deltacache.models.deltaworld import DeltaWorld
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.rgb_decoder import RgbDecoder

TrainedModel = DeltaTok | DeltaWorld | SegmentationHead | DepthHead | RgbDecoder
