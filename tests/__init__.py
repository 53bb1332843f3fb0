"""Tests, one folder per kind; unit tests mirror the packages."""
