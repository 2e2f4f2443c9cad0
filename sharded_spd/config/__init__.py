"""What users write: YAML or frozen dataclasses."""

from sharded_spd.config.schema import AnchorConfig, LayerConfig, SPDConfig, TelemetryConfig, load_config

__all__ = ["AnchorConfig", "LayerConfig", "SPDConfig", "TelemetryConfig", "load_config"]
