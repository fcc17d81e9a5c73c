"""One video on several ranks: who has which rows, and how rows get to a neighbour."""
