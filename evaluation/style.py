"""The style of every page: light or dark as the reader's own, from phone to print, system fonts alone."""

from .typeset import STYLES

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1b1b; --soft: #5c5c5c; --line: #ddd; --frame: #c4c4c4;
  --right: #1a7f37; --link: #1763a6; }
@media (prefers-color-scheme: dark) { :root { --paper: #16181c; --ink: #e8e6e3; --soft: #a9a6a1; --line: #3a3d43;
  --frame: #555a62; --right: #5ec87c; --link: #8cbcf0; }
  img.drawn { filter: invert(1) hue-rotate(180deg); }
  mark.unseen { color: #a9a6a1 !important; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .4rem; padding-top: .8rem;
  border-top: 2px solid var(--line); line-height: 1.25; }
h3 { font-size: 1rem; margin: 1.2rem 0 .25rem; } p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--link); }
nav { font-size: .95rem; columns: 15rem; margin: 1rem 0; } nav a { display: block; padding: .1rem 0; }
.note { color: var(--soft); font-size: .9rem; } .text { font-size: .9rem; margin-top: 1.2rem; }
.lead { font-size: 1.02rem; }
img { max-width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; } details { margin: 1rem 0; } summary { cursor: pointer; color: var(--link); }
table { border-collapse: collapse; font-size: .9rem; margin: .5rem 0; }
th, td { text-align: left; padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.figure { white-space: nowrap; font-variant-numeric: tabular-nums; }
.interval { color: var(--soft); font-size: .85em; font-weight: 400; }
table.findings td:nth-child(2) { font-weight: 700; white-space: nowrap; }
@media (max-width: 40rem) { table.findings tr { display: grid; grid-template-columns: 1fr auto; gap: 0 .6rem;
  border-bottom: 1px solid var(--line); padding: .3rem 0; } table.findings th { display: none; }
  table.findings td { border: 0; padding: .1rem 0; } table.findings td:nth-child(3) { grid-column: 1 / -1;
  color: var(--soft); font-size: .85em; } table.findings, table.findings tbody { display: block; } }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(15rem, 100%), 1fr)); gap: 1rem 1.5rem;
  border-bottom: 1px solid var(--line); padding: 1rem 0; }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(22rem, 100%), 1fr)); gap: 1rem;
  margin: .8rem 0; }
.results { display: grid; grid-template-columns: repeat(auto-fill, minmax(max(6.4rem, min(7.5rem, 28%)), 1fr));
  gap: .6rem;
  margin: .4rem 0 1.4rem; }
.strip { display: grid; gap: .8rem .7rem;
  grid-template-columns: repeat(auto-fill, minmax(max(6.6rem, min(7.9rem, 28%)), 1fr));
  margin: .4rem 0 1.2rem; padding-bottom: 1.2rem; border-bottom: 1px solid var(--line); }
.strip.wide { grid-template-columns: repeat(auto-fill, minmax(max(6.6rem, min(11.5rem, 28%)), 1fr)); }
.strip figcaption { font-size: .8rem; line-height: 1.45; } .strip img, .results img { width: 100%; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: 1.5rem; }
.batch img { margin-bottom: .8rem; width: 100%; max-width: 32rem; }
.case { display: grid; grid-template-columns: minmax(0, 1fr) 9rem 9rem; gap: 1rem; padding: 1rem 0;
  border-bottom: 1px solid var(--line); } .case img { width: 100%; }
@media (max-width: 40rem) { .case { grid-template-columns: 1fr 1fr; } .case > :first-child { grid-column: 1 / -1; } }
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figure b { display: block; margin-bottom: .3rem; }
figcaption { font-size: .9rem; margin-top: .3rem; }
.row img { width: 100%; max-width: 18rem; } .samples img { width: 100%; } .samples figcaption { font-size: .8rem; }
.samples .note { font-size: inherit; }
.hit { border: 1px solid var(--frame); padding: 4px; } .hit.is-right { border: 4px solid var(--right); padding: 1px; }
.is-right figcaption, .good { color: var(--right); font-weight: 700; }
.verdict { font-weight: 700; }
mark { padding: 0 .15em; border-radius: .15em; } mark.unseen { padding: 0; }
@media print { body { max-width: none; font-size: 11pt; } nav { columns: 2; } h2 { break-after: avoid; }
  figure, .case, tr, .strip { break-inside: avoid; } mark { print-color-adjust: exact; }
  details::details-content { content-visibility: visible; height: auto; } }
""" + "".join(
    f"mark.{style} {{ background: {ground or 'none'}; color: {'inherit' if style == 'plain' else ink}; }}\n"
    for style, (ground, ink) in STYLES.items()
)
