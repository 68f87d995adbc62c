"""Before anything is read: what two models have in common (`check`), and what their merge would take (`estimate`)."""
