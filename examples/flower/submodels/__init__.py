"""An app for Flower: every node trains a submodel that is as wide as it says it can carry."""
