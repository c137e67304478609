/** Where the page is, as text: `#/r/<run>/<page>?name=value`. Everything that a link should keep is in it. */
export interface Route {
  page: string
  run: string | null
  query: Record<string, string>
}

export const PAGES = ['run', 'rollouts', 't', 'group', 'tree', 'diff', 'live'] as const

export function parse(hash: string): Route {
  const text = hash.replace(/^#?\/?/, '')
  const at = text.indexOf('?')
  const path = (at < 0 ? text : text.slice(0, at)).split('/').filter(Boolean)
  const query: Record<string, string> = {}
  for (const [name, value] of new URLSearchParams(at < 0 ? '' : text.slice(at + 1))) query[name] = value
  if (path[0] === 'r' && path[1]) {
    return { page: path[2] ?? 'run', run: unescape(path[1]), query }
  }
  return { page: path[0] ?? 'runs', run: null, query }
}

function unescape(text: string): string {
  try {
    return decodeURIComponent(text)
  } catch {
    return text
  }
}

type Query = Record<string, string | number | boolean | null | undefined>

/** The hash of a page; empty and missing values are left out. */
export function link(run: string | null, page: string, query: Query = {}): string {
  const asked = new URLSearchParams()
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== '' && value !== false) asked.set(name, value === true ? '1' : String(value))
  }
  const text = asked.toString().replaceAll('%2F', '/')
  const path = run === null ? (page === 'runs' ? '/' : `/${page}`) : `/r/${encodeURIComponent(run)}${page === 'run' ? '' : `/${page}`}`
  return `#${path}${text ? `?${text}` : ''}`
}

/** A run's name in links: its folder's last part where that is unique, else its number. */
export function keyed<R extends { run: string; folder: string }>(runs: R[]): (R & { key: string })[] {
  const counts = new Map<string, number>()
  const last = (run: R) => run.folder.replace(/\/+$/, '').split('/').pop() || run.run
  for (const run of runs) counts.set(last(run), (counts.get(last(run)) ?? 0) + 1)
  return runs.map((run) => {
    const name = last(run)
    return { ...run, key: counts.get(name) === 1 && !/^r\d+$/.test(name) ? name : run.run }
  })
}
