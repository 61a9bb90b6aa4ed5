"""The offline jobs as one reads them, with what they say of themselves."""
