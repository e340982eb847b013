"""Flows to where others keep them: files of JSON lines, and OpenTelemetry collectors.

settings   what to export, from a YAML file in the form of Hubble's, read again when it changes
pump       a reader of the store that hands batches to a sink, again when that fails
jsonlines  a file, rotated
otlp       records and sums for an OpenTelemetry collector
manager    exports that come, change and go with the file
convert    filters and messages: the edge
"""
