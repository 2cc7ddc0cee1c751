"""The version of cpipe. Part of every stage's key: results of different versions are never taken for one another."""

VERSION = "0.1.0"
