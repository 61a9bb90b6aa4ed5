"""``deltacache doctor``: what this machine has, what is missing, and how long the published chains would take here."""
