"""The GPT family: model, presets, parameter table and FLOPs."""
