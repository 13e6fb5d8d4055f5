"""Quality of an asset for a study, as the hospital's own people see it."""
