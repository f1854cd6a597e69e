"""A client for inference engines that prune nothing: vision encoder, stage 1 and projector run here, the LLM there."""

from mmprune_train.serving.client import Answer, Client
from mmprune_train.serving.vision_side import VisionSide

__all__ = ["Answer", "Client", "VisionSide"]
