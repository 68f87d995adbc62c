"""The stages of a merge: one file each, and the road that runs them in order (`tmerge.stages.merge`)."""
