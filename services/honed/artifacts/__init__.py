"""Versions of models: their names, their manifests, the store of a run's policy and of its reward models.

| module | what it holds |
|---|---|
| `version` | the name of a version |
| `manifest`, `names` | what a version consists of, digested; what may be called how |
| `store`, `draft` | publish, list, fetch, retain; what is to be published |
| `verify` | checks a local copy against its manifest |
| `reward_models` | reward models in the same store, `artifact:NAME/VERSION` |
| `promotions` | the record of which reward models serve |
| `marks` | quarantined and promoted versions |
| `tokenizer` | a run's tokenizer without its weights |
| `settings` | the run file's section |
| `files`, `calls` | local directories and object stores, with deadlines |
| `tensors`, `fields` | strict reading of safetensors headers and of JSON |
"""
