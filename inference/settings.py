"""What an engine's settings must be."""

from dataclasses import fields

from conf.errors import ConfigError
from conf.serving import FORMS, EngineConfig
from inference.methods import Methods


def check_settings(settings: EngineConfig) -> None:
    """Raises ConfigError for values that no engine can work with."""
    if settings.dtype not in FORMS:
        raise ConfigError("engine.dtype", settings.dtype, f"must be one of {', '.join(FORMS)}", "choose one of them")
    methods = Methods().resolved(settings)
    if settings.draft_tokens:
        methods.drafter_for(settings)
    for item in fields(settings):
        value = getattr(settings, item.name)
        least = 0 if item.name in ("kv_tokens", "draft_tokens", "decode_layers") else 1
        if isinstance(item.default, int) and not isinstance(item.default, bool) and value < least:
            raise ConfigError(f"engine.{item.name}", value, f"must be a whole number from {least} on", "raise it")
    if settings.mixed_slowdown and not settings.mixed_slowdown > 1.0:
        rule = "must be above 1, or 0 for a fixed number of rows"
        raise ConfigError("engine.mixed_slowdown", settings.mixed_slowdown, rule, "engine.mixed_slowdown=1.75")
