"""An embedded world of made-up things, written in the published formats, that the demo and the tests run on."""
