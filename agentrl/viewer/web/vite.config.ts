import { svelte } from '@sveltejs/vite-plugin-svelte'
import { defineConfig } from 'vitest/config'

// Names carry hashes of what the files hold, and nothing carries a date: two builds are the same bytes, and a browser
// may keep them for ever.
export default defineConfig(({ mode }) => ({
  base: './',
  plugins: [svelte()],
  server: { port: 5199, proxy: { '/api': 'http://127.0.0.1:8877' } },
  build: {
    outDir: '../static',
    emptyOutDir: true,
    target: 'es2022',
    modulePreload: false,
    cssCodeSplit: false,
    assetsInlineLimit: 0,
    reportCompressedSize: false,
    rollupOptions: {
      output: {
        entryFileNames: 'assets/app-[hash].js',
        chunkFileNames: 'assets/[name]-[hash].js',
        assetFileNames: (file: { names?: string[] }) => {
          const name = file.names?.[0] ?? ''
          return name.endsWith('.css') ? 'assets/app-[hash].css' : 'assets/[name]-[hash][extname]'
        },
      },
    },
  },
  test: { environment: 'node', include: ['tests/**/*.test.ts'] },
  define: mode === 'production' ? { __DEV__: 'false' } : { __DEV__: 'true' },
}))
