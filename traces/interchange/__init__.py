"""Other tools' routing records in and out: one file per format, and what they share.

`settings` what an import is told -> a format's `Source` yields `Record`s -> `record` checks each -> `importing` plans
and writes; `exporting` hands sequences to a format's `write`. docs/INTERCHANGE.md describes the formats.
"""
