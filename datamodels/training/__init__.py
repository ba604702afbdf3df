"""The module names of the released code, and nothing else: what is here is done elsewhere in the package."""
