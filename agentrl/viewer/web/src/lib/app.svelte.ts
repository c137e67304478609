/** What all pages share: the route, the runs, the theme, the clock. */
import { get } from './api'
import { keyed, link, parse, type Route } from './route'
import type { Run } from './types'

export const app = $state<{
  route: Route
  runs: (Run & { key: string })[] | null
  /** Runs that are there but not listed. */
  leftOut: number
  failed: Error | null
  theme: 'system' | 'light' | 'dark'
  dark: boolean
  help: boolean
  now: number
}>({ route: parse(location.hash), runs: null, leftOut: 0, failed: null, theme: 'system', dark: false, help: false, now: Date.now() / 1000 })

export async function loadRuns(): Promise<void> {
  try {
    const got = await get<{ runs: Run[]; left_out?: number }>('runs')
    app.runs = keyed(got.runs)
    app.leftOut = got.left_out ?? 0
    app.failed = null
  } catch (error) {
    app.failed = error as Error
  }
}

export function runOf(key: string | null): (Run & { key: string }) | null {
  return app.runs?.find((run) => run.key === key) ?? app.runs?.find((run) => run.run === key) ?? null
}

export function go(hash: string): void {
  location.hash = hash
}

/** Change the query of this page; `replace` leaves no step in the history. */
export function setQuery(change: Record<string, string | number | boolean | null | undefined>, replace = true): void {
  const { run, page, query } = app.route
  const hash = link(run, page, { ...query, ...change })
  if (hash === location.hash) return
  if (replace) {
    history.replaceState(null, '', hash)
    app.route = parse(hash)
  } else go(hash)
}

const system = matchMedia('(prefers-color-scheme: dark)')

function paint(): void {
  app.dark = app.theme === 'system' ? system.matches : app.theme === 'dark'
  document.documentElement.dataset.theme = app.dark ? 'dark' : 'light'
}

export function setTheme(theme: 'system' | 'light' | 'dark'): void {
  app.theme = theme
  try {
    if (theme === 'system') localStorage.removeItem('theme')
    else localStorage.setItem('theme', theme)
  } catch {
    // no storage: the choice lasts as long as the page
  }
  paint()
}

export function start(): void {
  window.addEventListener('hashchange', () => (app.route = parse(location.hash)))
  system.addEventListener('change', paint)
  let kept: string | null = null
  try {
    kept = localStorage.getItem('theme')
  } catch {
    // as above
  }
  setTheme(kept === 'light' || kept === 'dark' ? kept : 'system')
  window.setInterval(() => (app.now = Date.now() / 1000), 20_000)
  void loadRuns()
}
