"""What the tabs are made of: cards, figures, the form, and the parts of a tab that stand alone."""
