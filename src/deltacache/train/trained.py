"""What the loop can train."""

from deltacache.models.deltatok import DeltaTok
from deltacache.models.heads import DepthHead, SegmentationHead
from deltacache.models.rgb_decoder import RgbDecoder
from deltacache.models.world_model import WorldModel

TrainedModel = DeltaTok | WorldModel | SegmentationHead | DepthHead | RgbDecoder
