"""Which pipeline rank holds a stage."""


def rank_of_stage(stage: int, pipeline: int) -> int:
    """Looped placement (Narayanan et al. 2021): stage s lies on rank s mod pipeline."""
    return stage % pipeline
