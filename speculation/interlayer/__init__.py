"""InterLayer: a network over the routing of the layers below and of all earlier tokens."""

from speculation.interlayer.predictor import InterLayer, InterLayerOptions

__all__ = ["InterLayer", "InterLayerOptions"]
