"""Tables and plots for people: the only door to matplotlib."""
