"""Run files that reproduce a method, one each."""
