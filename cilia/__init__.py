"""The library of Cilia: what every service, the command line and the tests may import.

It imports none of them. Each module owns one noun; see the map in README.md.
"""
