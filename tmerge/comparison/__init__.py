"""What is held against what: models (`evaluate`), ways to train (`compare`), a run and its repetition (`reproduce`).

Called comparison, as ``tmerge.compare`` is the function: a package of that name would take its place.
"""
