"""One click command per file. Verbs parse and print; what they do lives in the packages, imported when called."""
