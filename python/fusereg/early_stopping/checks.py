"""The name that begins every error message of this package."""

OP = "fusereg.EarlyStopping"
